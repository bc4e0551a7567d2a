"""Where output goes: results to standard output, notes to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedloom.errors import FedloomError
from fedloom.wording import printable, typed


class Result(Protocol):
    """What a command prints: plain values for programs, lines for people."""

    def as_dict(self) -> Mapping[str, Any]:
        """Return the result as plain JSON values."""

    def lines(self) -> Iterable[str]:
        """Return the result as lines of text."""


def print_result(result: Result, *, as_json: bool) -> None:
    """Print a result to standard output."""
    if as_json:
        print_json(result.as_dict())
    else:
        for line in result.lines():
            print_line(line)


def print_json(value: object) -> None:
    """Print plain values as indented JSON."""
    print_line(json.dumps(value, indent=2, ensure_ascii=False))


def print_line(text: str) -> None:
    """Print text to standard output; names, rows and replies in it do nothing to a terminal."""
    with output_explained():
        print(printable(text))


@contextlib.contextmanager
def output_explained() -> Iterator[None]:
    """Say that standard output takes no more; a reader that has seen enough (``| head``) is no mistake.

    Raises:
        FedloomError: it is full or broken.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        takes_all_output()
        raise FedloomError(
            f"standard output: expected a place for the result, got: {(error.strerror or str(error)).lower()}; "
            "free space, or send it elsewhere"
        ) from error


def takes_all_output() -> bool:
    """Tell whether standard output takes what is left for it; if not, let go of it.

    It would make Python stumble at its end, after the last line was said.
    """
    try:
        sys.stdout.flush()
        takes = not _reader_is_gone()
    except OSError:
        takes = False
    if not takes:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return takes


def _reader_is_gone() -> bool:
    """Tell whether standard output is a pipe that nobody reads; a flush tells so only where something is left."""
    try:
        place = sys.stdout.fileno()
    except OSError:
        return False  # no file of the system
    if not hasattr(select, "poll"):
        return False
    asked = select.poll()
    asked.register(place, 0)
    return any(found & select.POLLERR for _, found in asked.poll(0))


def say_folder(kind: str, folder: Path) -> None:
    """Say where a result lies, and what makes a report of it."""
    say(f"{kind} folder: {folder}; for a report: {typed('fedloom', 'report', folder)}")


def say(message: str) -> None:
    """Print a note to standard error."""
    with contextlib.suppress(OSError):  # a full or closed log ends no run
        print(printable(message), file=sys.stderr)
