"""Numbers in words, written the same way everywhere, and foreign text made fit to print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import Literal

Unit = Literal["", "%", "B", "s"]
# C0 and C1 but for tab and line end, line separators, what turns the direction of writing, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_NEAR = 0.5
"""Likeness from which on a name is probably a misspelt one."""


def printable(text: str) -> str:
    """Return text that no terminal takes for a command: control characters are spelt out, as in ``\\u001b``.

    Names of files, rows and replies are other people's text. JSON stays the same JSON.
    """
    return _UNPRINTABLE.sub(_spelt, text)


def one_line(text: str) -> str:
    """Return printable text whose tabs and line ends are spelt out too: a label, a reason, a cell of a table."""
    return re.sub(r"[\t\n]", _spelt, printable(text))


def _spelt(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def written(value: float, unit: Unit, digits: int = 3) -> str:
    """Return a number as people read it: bytes in decimal multiples, everything else with fixed digits."""
    match unit:
        case "B":
            return written_bytes(value)
        case "s":
            return f"{value:.1f} s"
        case "%":
            return f"{100 * value:.1f} %"
        case "":
            return f"{value:.{digits}f}"


class Displayed:
    """What has lines for people shows them in a notebook."""

    def lines(self) -> Iterable[str]:
        """Return the lines."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return f"<pre>{escape(printable(chr(10).join(self.lines())))}</pre>"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that was probably meant; None where none is near."""
    return next(iter(get_close_matches(name, list(names), 1, _NEAR)), None)


def meant(name: str, names: Iterable[str]) -> str:
    """Return ``did you mean 'x'? `` of the name that is nearest, nothing where none is near."""
    near = nearest(name, names)
    return f"did you mean {near!r}? " if near else ""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 round, 1,200 rounds."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def first_line(error: BaseException) -> str:
    """Return the line of an error that says what is wrong: a validator's first only names the check."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "expected" in line), lines[0] if lines else type(error).__name__)


def counted_rounds(trained: int, before: int = 0) -> str:
    """Return the rounds of a run, with those before the first in which anything is trained."""
    return (
        f"{counted(before, 'round')} for the start and {trained:,} of training" if before else counted(trained, "round")
    )


def worded(value: object) -> str:
    """Return a setting's value as people say it, not as Python does: not set, true, 0.2, flora."""
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)


def typed(*words: object) -> str:
    """Return a command as a shell takes it: a word with a blank in it is quoted."""
    return " ".join(shlex.quote(str(word)) for word in words)


def resuming(run: Path) -> str:
    """Return the command that goes on with a run, or writes what is missing of its result."""
    return typed("fedloom", "run", run / "config.json", "--out", run)


def either(words: Iterable[str]) -> str:
    """Return words as alternatives: a; a or b; a, b or c."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def written_seconds(seconds: float) -> str:
    """Return a duration in the unit that people would use: 45 s, 12 min, 3.5 h, 8.1 days."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:,.1f} days"


def written_bytes(num_bytes: float) -> str:
    """Return a size in decimal multiples: 999 B, 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
