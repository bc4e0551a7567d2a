"""Run several methods over several seeds on the same data at the same budget, into one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.assembly.inputs import Workshop
from fedloom.assembly.preparation import Preparation
from fedloom.config import Settings, every_variant
from fedloom.errors import RunError
from fedloom.experiment.parallel_runs import check_parallel, run_in_processes
from fedloom.experiment.run_summary import RunSummary
from fedloom.experiment.session import run
from fedloom.file_formats import COMPARISON
from fedloom.reporting.progress import Progress, SilentProgress
from fedloom.reporting.run_groups import table_of
from fedloom.reporting.tables import Comparison, reference_among
from fedloom.run_folder import durable
from fedloom.run_folder.reader import StoredRun, read_run
from fedloom.run_folder.run_date import date_of_all

FILES = ("comparison.json", "demo.json")


@dataclass(frozen=True)
class MethodsComparison:
    """Every run of a comparison, and the table over them."""

    folder: Path
    runs: tuple[RunSummary, ...]
    table: Comparison

    def as_dict(self) -> dict[str, Any]:
        """Return runs and table as plain values."""
        return {"folder": str(self.folder), "table": self.table.to_json(), "runs": [r.as_dict() for r in self.runs]}

    def lines(self) -> list[str]:
        """Return the table for people."""
        console = Console(width=150, color_system=None)
        with console.capture() as capture:
            console.print(self.table.to_rich())
        return capture.get().rstrip().splitlines()


def compare(
    settings: Settings,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path | str,
    *,
    reference: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    parallel: int = 1,
) -> MethodsComparison:
    """Run every method with every seed into ``out/<method>-seed<k>/`` and tabulate them.

    All are of one day, that of the first. Runs that are complete are not run again, so a comparison resumes and grows
    by methods and seeds. The table sets each method against ``reference``, by default FedIT where it is one of several.
    With ``parallel`` above 1 that many run at once, each in a process of its own, to the same results.

    Raises:
        SettingsError: a method or seed does not exist or comes twice, or a variant is not valid; nothing was run.
        EvaluationError: ``reference`` is not among the methods; nothing was run.
        RunError: ``out`` is a run, or holds another's comparison.json; nothing was touched.
        FedloomError: as for :func:`run`; of all runs before the first begins, where they run one after the other.
    """
    variants = every_variant(settings, methods, seeds)
    reference = reference_among(methods, reference)
    refuse_other_folder(Path(out))
    out, progress = Path(out), progress or SilentProgress()
    check_parallel(variants, parallel)
    planned = [(one, out / f"{one.method.name}-seed{one.run.seed}") for one in variants]
    date = date_of_all([folder for _, folder in planned], fresh)
    if parallel > 1:
        runs = run_in_processes(planned, parallel, date, fresh=fresh, progress=progress)
    else:
        runs = _one_after_another(planned, date, fresh, progress)
    stored: dict[str, list[StoredRun]] = {}
    for summary in runs:
        stored.setdefault(summary.method, []).append(read_run(summary.folder))
    table = table_of(stored, reference)
    result = MethodsComparison(out, tuple(runs), table)
    durable.write_json(out / "comparison.json", {"format_version": COMPARISON.number, **result.as_dict()})
    return result


def _one_after_another(
    planned: Sequence[tuple[Settings, Path]], date: str, fresh: bool, progress: Progress
) -> list[RunSummary]:
    workshop, runs = Workshop(progress), list[RunSummary]()
    # What is in the way of a later run is told now, not hours later; base and tokens are then there for the runs.
    for settings, folder in planned:
        Preparation(settings, folder, workshop, fresh, date).complete()
    for settings, folder in planned:
        method, seed = settings.method.name, settings.run.seed
        progress.note(f"run {len(runs) + 1} of {len(planned)}: {method}, seed {seed}")
        runs.append(run(settings, folder, date=date, fresh=fresh, progress=progress, workshop=workshop))
    return runs


def refuse_other_folder(out: Path) -> None:
    """Check that ``out`` can hold a comparison: it is not a run, and files that would be replaced are fedloom's.

    Raises:
        RunError: it cannot; nothing was touched.
    """
    if (out / "manifest.json").exists():
        raise RunError(f"--out {out}: expected a folder for several runs, got a run; choose another --out")
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out}: expected a folder for several runs, got a file; choose another --out")
    for name in FILES:
        if not (out / name).exists():
            continue
        try:
            there = durable.read_json(out / name)
        except RunError:
            there = None
        if not isinstance(there, dict) or not {"folder", "table", "runs"} <= there.keys():
            raise RunError(
                f"{out / name}: expected a file that fedloom wrote, found another, which would be replaced; choose "
                "another --out"
            )
        COMPARISON.check(out / name, there.get("format_version", 1), RunError)  # the first files had no number
