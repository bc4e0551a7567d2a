"""The command line: parse, call, print, exit code; nothing else."""

from fedloom.cli.app import app, main

__all__ = ["app", "main"]
