"""The runs that a report, a table or a figure is about: read, grouped, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import RunError
from fedloom.reporting.run_groups import RunGroup, group_runs
from fedloom.reporting.tables import reference_among
from fedloom.reporting.tuned import Tuning, read_tuning
from fedloom.run_folder.reader import StoredRun, find_runs, read_run


@dataclass(frozen=True)
class Collected:
    """Groups of runs, the method that others are set against, what was tuned, and what could not be read."""

    groups: list[RunGroup]
    reference: str | None
    damaged: list[str]
    tunings: list[Tuning]


def collect(runs: Sequence[Path], reference: str | None = None) -> Collected:
    """Read run folders, or folders of run folders.

    The methods are set against ``reference``, by default FedIT where it is one of several.

    Raises:
        RunError: there is no run, or none can be read or has a completed round yet.
        EvaluationError: ``reference`` is not among the methods.
    """
    paths = [found for path in runs for found in find_runs(path)]
    if not paths:
        raise RunError("expected at least one run folder to report on, got none; name one")
    found, damaged = _readable(dict.fromkeys(paths))
    if len(paths) == 1 and found[0].adapter_folder is not None:
        found[0].check_adapter()  # of several, the page says which was left out
    groups = group_runs(found)
    _check_begun(groups)
    tunings = _tunings(runs, damaged)
    return Collected(groups, reference_among([group.label for group in groups], reference), damaged, tunings)


def _readable(paths: Iterable[Path]) -> tuple[list[StoredRun], list[str]]:
    """Return the runs that can be read, and what is wrong with each of the others.

    Raises:
        RunError: none can be read.
    """
    found, damaged = [], []
    for path in paths:
        try:
            found.append(read_run(path))
        except RunError as error:
            damaged.append(str(error))
    if not found:
        raise RunError("; ".join(damaged))
    return found, damaged


def _tunings(runs: Iterable[Path], damaged: list[str]) -> list[Tuning]:
    """Return what was chosen before the comparisons in these folders; what is damaged is added to the others."""
    found = []
    for folder in dict.fromkeys(runs):
        try:
            found.append(read_tuning(folder))
        except RunError as error:
            damaged.append(str(error))
    return [one for one in found if one is not None]


def _check_begun(groups: Sequence[RunGroup]) -> None:
    runs = [run for group in groups for run in group.runs]
    if not any(run.records or run.finished for run in runs):
        named = ", ".join(str(run.path) for run in runs)
        raise RunError(
            f"{named}: expected a completed round, got none; resume the run first, with the command that began it"
        )
