"""What a run would refuse of its rows, all at once: shapes, missing answers, lengths, clients, and what needs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedloom.assembly.inputs import Workshop
from fedloom.assembly.preparation import Preparation
from fedloom.config import Settings
from fedloom.errors import FedloomError
from fedloom.preview.rehearsal import SketchWorkshop, Verdict, rehearse_rows

_POLICIES = ("unanswered", "overlong")


@dataclass(frozen=True)
class RowCheck:
    """What is in the way, what was found, and what could not be looked at; lines for people."""

    problems: tuple[str, ...]
    found: tuple[str, ...]
    unknown: tuple[str, ...]


def check_rows(settings: Settings, out: Path, workshop: Workshop | None = None) -> RowCheck:
    """Read all rows, make tokens of them and deal them to the clients, as a run in a fresh ``out`` would.

    No weight is loaded and nothing is fetched. A run ends at the first row that it refuses; here rows without an answer
    and rows that are too long are both named, and then what is wrong once such rows are dropped.
    """
    workshop = workshop or SketchWorkshop()
    prepared = Preparation(settings, out, workshop, fresh=True)
    findings = list(rehearse_rows(prepared))
    problems = [one.why for one in findings if one.verdict is Verdict.NO]
    if any(one.verdict is Verdict.NO and one.need == "rows as tokens" for one in findings):
        problems = _all_of_rows(prepared, problems)
    found = tuple(f"{one.need}: {one.why}" for one in findings if one.verdict is Verdict.YES)
    unknown = tuple(f"{one.need}: {one.why}" for one in findings if one.verdict is Verdict.UNKNOWN)
    return RowCheck(tuple(dict.fromkeys(problems)), found, unknown)


def _all_of_rows(prepared: Preparation, first: list[str]) -> list[str]:
    """Return one message for every kind of refused row, and what else is wrong without those rows."""
    settings = prepared.settings
    strict = [name for name in _POLICIES if getattr(settings.data, name) == "error"]
    if not strict:
        return first
    kinds = []
    for name in strict:
        others = _with(settings, {other: "drop" for other in strict if other != name})
        if (told := _refusal(prepared, others)) is not None:
            kinds.append(told)
    rest = _refusal(prepared, _with(settings, dict.fromkeys(strict, "drop")))
    if rest is None or rest in kinds:
        return kinds or first
    # What is still wrong without such rows is the first thing wrong of every kind of them, if there are none.
    alone = [told for told in kinds if told != rest]
    return [*alone, f"without such rows: {rest}"] if alone else [rest]


def _refusal(prepared: Preparation, settings: Settings) -> str | None:
    """Return what a run of other settings would say of the rows, the clients and the method; None for nothing."""
    other = Preparation(settings, prepared.out, prepared.workshop, fresh=True)
    try:
        other.plan  # noqa: B018
    except FedloomError as error:
        return str(error)
    return None


def _with(settings: Settings, changes: dict[str, str]) -> Settings:
    return settings.model_copy(update={"data": settings.data.model_copy(update=changes)})
