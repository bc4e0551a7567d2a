"""Run a command of the command line in a fork of this process, which has imported all of it and computed nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.disk_faults import DiskFault

from fedloom.cli.app import exit_code

CRASHED = 70
_SEEN: set[str] = set()


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it said on standard error, and the changes of the disk it made."""

    code: int
    said: str
    changes: tuple[str, ...]

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def command(folder: Path, arguments: list[str], at: int | None = None, number: int | None = None) -> Ended:
    """Run a command with ``folder`` as its working folder, and a fault at the change ``at`` of what is in it."""
    return forked(folder, lambda: exit_code(arguments), at, number)


def forked(folder: Path, act: Callable[[], Any], at: int | None = None, number: int | None = None) -> Ended:
    """Let a fork do something in ``folder``; an exception that is none of ours ends with :data:`CRASHED`."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(folder, act, DiskFault(str(folder), at, number), writing)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123
        said, _, told = pipe.read().decode(errors="replace").partition("\0")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes, modules = json.loads(told) if told else ([], [])
    _warm(modules)
    return Ended(code, said, tuple(changes))


def _child(folder: Path, act: Callable[[], Any], fault: DiskFault, writing: int) -> None:
    code = CRASHED
    try:
        os.chdir(folder)
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        fault.install()
        code = act() or 0
    except BaseException:
        traceback.print_exc()
    fault.at = None
    sys.stderr.flush()
    modules = sorted(name for name in sys.modules if name not in _SEEN)
    os.write(writing, b"\0" + json.dumps([fault.changes, modules]).encode())
    os._exit(code)


def _warm(modules: list[str]) -> None:
    """Import what a fork needed, so that the next need not."""
    for name in modules:
        if name not in sys.modules and name not in _SEEN and name.split(".")[0] != "tests":
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    _SEEN.update(modules)
