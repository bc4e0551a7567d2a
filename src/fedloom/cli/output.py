"""Where output goes: results to standard output, words for people to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from fedloom.wording import printable


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
    print(printable(text))


def say(message: str) -> None:
    """Tell a person something."""
    print(printable(message), file=sys.stderr)
