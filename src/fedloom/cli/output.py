"""Where output goes: results to standard output, notes to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol


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
            print(line)


def print_json(value: object) -> None:
    """Print plain values as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(message: str) -> None:
    """Print a note to standard error."""
    print(message, file=sys.stderr)
