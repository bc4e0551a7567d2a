"""The battery: every law on a subject, over scenes and seeds, and the table of what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.audit.laws import LAWS, Measured
from fedloom.audit.subject import Scene, Subject
from fedloom.errors import FedloomError
from fedloom.methods.traits import Law

EQUAL, UNEQUAL = (4, 4, 4, 4), (8, 4, 2, 2)
SCENES: Mapping[str, tuple[int, ...]] = {"equal ranks": EQUAL, "ranks 8, 4, 2, 2": UNEQUAL}
SEEDS = (1, 2, 3, 4)
TOLERANCE = 1e-5
"""A law holds where it is off by less, relatively: some tens of float32's roundings, far below what a defect makes."""
WIDTH = 116

ONE_RANK = "it is for equal ranks only"
HOLDS, BROKEN, UNCLAIMED, EXEMPT = "holds", "broken", "not claimed", "does not apply"


@dataclass(frozen=True)
class Finding:
    """A law as it was found.

    Attributes:
        says: the law in one sentence.
        off_by: how far off at most, over the seeds, by scene; None where the subject failed. Scenes at which the law
            is not measured are absent.
        note: why it does not apply, or how the subject failed.
    """

    law: Law
    says: str
    is_claimed: bool
    off_by: Mapping[str, float | None]
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it was kept wherever it was measured."""
        return all(value is not None and value < TOLERANCE for value in self.off_by.values())

    @property
    def verdict(self) -> str:
        """What became of the law, in a word or two."""
        if not self.off_by:
            return EXEMPT
        if not self.is_claimed:
            return UNCLAIMED
        return HOLDS if self.holds else BROKEN


@dataclass(frozen=True)
class Audit:
    """What an audit found, law by law."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Law, ...]:
        """The laws that the subject claims and does not keep."""
        return tuple(one.law for one in self.findings if one.verdict == BROKEN)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        laws = [
            {"law": str(f.law), "says": f.says, "verdict": f.verdict, "off_by": dict(f.off_by), "note": f.note}
            for f in self.findings
        ]
        return {"subject": self.subject, "tolerance": TOLERANCE, "broken": list(map(str, self.broken)), "laws": laws}

    def lines(self) -> list[str]:
        """Return the table for people, a line per note, and the result."""
        table = Table()
        for title in ("law", "what it says"):
            table.add_column(title)
        for title in SCENES:
            table.add_column(title, justify="right")
        table.add_column("verdict")
        for one in self.findings:
            measured = (_shown(one.off_by, title) for title in SCENES)
            table.add_row(*map(Text, (str(one.law), one.says, *measured, one.verdict)))
        console = Console(width=WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(table)
        notes = [f"{one.law}: {one.note}" for one in self.findings if one.note]
        return [*capture.get().rstrip().splitlines(), *notes, self._result()]

    def _result(self) -> str:
        if self.broken:
            return f"{self.subject}: broken: {', '.join(self.broken)}"
        return f"{self.subject}: every law that it claims holds"


def audit(subject: Subject) -> Audit:
    """Measure every law on a subject."""
    return Audit(subject.name, tuple(_found(subject, one) for one in LAWS))


def _found(subject: Subject, one: Measured) -> Finding:
    is_claimed, off_by = one.law in subject.claims, dict[str, float | None]()
    if reason := subject.exempt(one.law):
        return Finding(one.law, one.says, is_claimed, {}, reason)
    note = "" if any(_is_measured(subject, one, ranks) for ranks in SCENES.values()) else ONE_RANK
    for title, ranks in SCENES.items():
        if not _is_measured(subject, one, ranks):
            continue
        try:
            found = _worst(subject, one, title, ranks)
        except FedloomError as error:
            off_by[title], note = None, str(error)
            continue
        if isinstance(found, str):
            note = found
        else:
            off_by[title] = found
    return Finding(one.law, one.says, is_claimed, off_by, note)


def _is_measured(subject: Subject, one: Measured, ranks: tuple[int, ...]) -> bool:
    if ranks == EQUAL:
        return one.at_equal_ranks
    return one.at_unequal_ranks and not subject.needs_one_rank


def _worst(subject: Subject, one: Measured, title: str, ranks: tuple[int, ...]) -> float | str:
    """Return how far off a law is at most, over the seeds, or why it does not apply.

    Raises:
        FedloomError: the subject failed.
    """
    values = []
    for seed in SEEDS:
        value = one.measure(subject, Scene(title, ranks, seed))
        if isinstance(value, str):
            return value
        values.append(value)
    return max(values)


def _shown(off_by: Mapping[str, float | None], title: str) -> str:
    """Return a cell: off by how much, with two digits."""
    if title not in off_by:
        return "–"
    value = off_by[title]
    return "failed" if value is None else f"{value:.2g}"
