"""``python -m fedloom.cli``."""

from fedloom.cli.app import main

main()
