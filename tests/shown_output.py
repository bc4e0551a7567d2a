"""What pages show beside their commands, and whether a command prints it.

In a ``console`` block the lines below a command are lines of what it prints, in that order; others may stand between
them. A block without a language right after it continues what its last command prints. Words are the same, numbers
nearly: two kinds of processor round differently. Lines that only rule a table are not compared. A line that ends in …
is the beginning of what is printed: in a table of times these are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

TOLERANCE = 0.02
"""Share by which a printed number may differ from the one that is shown; 0.01 where the number is nearly 0.

A number of two digits and a decimal, as 3.2, may differ by one in its last.
"""
_MANY = 20
"""A count of so many or more, as of singular values above a bound, may differ by one."""
_BLOCKS = re.compile(
    r"^```(?:console|bash|sh)\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_RULE = re.compile(r"[\s\u2500-\u257f]*")
_NUMBER = re.compile(r"(?<![\w.])[−+-]?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?")


def blocks_on(page: str) -> Iterator[list[tuple[str, list[str]]]]:
    """Yield each block of commands in a page's text: every command, and the lines that are shown of what it prints."""
    for commands, printed in _BLOCKS.findall(page):
        listed = list(shown_beside(commands))
        if listed:
            listed[-1][1].extend(line for line in printed.splitlines() if not _RULE.fullmatch(line))
        yield listed


def shown_beside(block: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a block, without its prompt and with its continued lines, and the lines shown below it."""
    command, below = None, list[str]()
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("$ ") or re.match(r"fedloom\b", line):
            if command is not None:
                yield command, below
            command, below = line.removeprefix("$ "), []
        elif line.strip() and command is not None:
            below.append(line)
    if command is not None:
        yield command, below


def is_like(shown: str, printed: str) -> bool:
    """Tell whether a printed line has the words of the one that is shown, and nearly its numbers."""
    if shown.endswith(" …"):
        begun = shown.split()[:-1]
        shown, printed = " ".join(begun), " ".join(printed.split()[: len(begun)])
    if [part.split() for part in _NUMBER.split(shown)] != [part.split() for part in _NUMBER.split(printed)]:
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(_is_near(one, other) for one, other in pairs)


def missing(shown: Sequence[str], printed: Sequence[str]) -> list[str]:
    """Return the shown lines that are not printed in that order."""
    rest, absent = list(printed), []
    for line in shown:
        place = next((i for i, other in enumerate(rest) if is_like(line, other)), None)
        if place is None:
            absent.append(line)
        else:
            rest = rest[place + 1 :]
    return absent


def _is_near(shown: str, printed: str) -> bool:
    one, other = _value(shown), _value(printed)
    if one.is_integer() and other.is_integer() and min(one, other) >= _MANY and abs(one - other) <= 1:
        return True
    last = 0.1 if all(re.fullmatch(r"[1-9]\.\d", number) for number in (shown, printed)) else 0.01
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1.01 * last)


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))
