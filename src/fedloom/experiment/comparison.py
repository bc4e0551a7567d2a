"""Run several methods over several seeds on the same data at the same budget, into one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.assembly.inputs import Workshop
from fedloom.assembly.preparation import Preparation
from fedloom.config import Settings, compared_variants, with_seed
from fedloom.config.grid import MethodGrid
from fedloom.errors import RunError
from fedloom.experiment.parallel_runs import check_parallel, run_in_processes
from fedloom.experiment.run_summary import RunSummary
from fedloom.experiment.session import run
from fedloom.experiment.tuning import TuningPlan
from fedloom.file_formats import COMPARISON, TUNING
from fedloom.preview.runs_at_once import runs_at_once
from fedloom.reporting import tuned
from fedloom.reporting.budget import unequal_rows
from fedloom.reporting.paper import tuned_to
from fedloom.reporting.progress import Progress, progress_in_notebook
from fedloom.reporting.run_groups import table_of
from fedloom.reporting.tables import Comparison, reference_among
from fedloom.reporting.tuned import Tuning
from fedloom.run_folder import durable
from fedloom.run_folder.claim import is_begun
from fedloom.run_folder.reader import StoredRun, read_run
from fedloom.run_folder.run_date import date_of_all

FILES = {
    "comparison.json": (COMPARISON, {"folder", "table", "runs"}),
    "demo.json": (COMPARISON, {"folder", "table", "runs"}),
    tuned.FILE: (TUNING, {"seed", "methods", "sha256"}),
}
"""Files of a comparison's folder that are replaced, their formats, and what fedloom's own always hold."""


@dataclass(frozen=True)
class MethodsComparison:
    """Every run of a comparison, the table over them, and what was chosen before where it was tuned."""

    folder: Path
    runs: tuple[RunSummary, ...]
    table: Comparison
    tuning: Tuning | None = None

    @property
    def warnings(self) -> list[str]:
        """What is not equal between the methods."""
        return [told for told in (unequal_rows(self.table),) if told is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return runs and table as plain values."""
        return {
            "folder": str(self.folder),
            "table": self.table.to_json(),
            "warnings": self.warnings,
            "tuning": None if self.tuning is None else self.tuning.as_dict(),
            "runs": [r.as_dict() for r in self.runs],
        }

    def lines(self) -> list[str]:
        """Return the tables for people."""
        console = Console(width=150, color_system=None)
        with console.capture() as capture:
            if self.tuning is not None:
                console.print(self.tuning.to_rich())
            console.print(self.table.to_rich())
        return [*capture.get().rstrip().splitlines(), *self.warnings]

    def _repr_html_(self) -> str:
        """Return the table for a notebook; what was chosen and what is not equal follow as text."""
        chosen = "" if self.tuning is None else tuned_to([self.tuning])
        return self.table.to_html() + "".join(f"<p>{escape(told)}</p>" for told in (chosen, *self.warnings) if told)


def compare(
    settings: Settings,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path | str,
    *,
    overrides: Sequence[str] = (),
    grid: Sequence[str] = (),
    tune_seed: int | None = None,
    validation: float | None = None,
    reference: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    parallel: int = 1,
) -> MethodsComparison:
    """Run every method with every seed into ``out/<method>-seed<k>/`` and tabulate them.

    All are of one day, that of the first. Runs that are complete are not run again, so a comparison resumes and grows
    by methods and seeds. The table sets each method against ``reference``, by default FedIT where it is one of several.
    With ``parallel`` above 1 that many run at once, each in a process of its own, to the same results; fewer where the
    memory planned for them is more than is free.

    ``overrides`` are settings of one method, ``METHOD:table.setting=value``. ``grid`` holds values to choose from, for
    all methods or for one: ``[METHOD:]table.setting=value,value,...``. Of the product of all, each method gets the
    point of the lowest loss on validation rows: ``validation`` (a tenth) of the training rows of ``tune_seed`` (the
    first seed), on which no run is scored. Its runs are in ``out/tuning/<method>/``, and resume as the others do.

    Raises:
        SettingsError: a method or seed does not exist or comes twice, or a variant is not valid; nothing was run.
        EvaluationError: ``reference`` is not among the methods; nothing was run.
        RunError: ``out`` is a run, or holds another's comparison.json; nothing was touched.
        FedloomError: as for :func:`run`; of all runs before the first begins, where they run one after the other.
    """
    out, progress = Path(out), progress or progress_in_notebook()
    grids = compared_variants(settings, methods, seeds, overrides, grid)
    plan = TuningPlan.of(grids, out, seeds, tune_seed, validation)
    reference = reference_among(methods, reference)
    refuse_other_folder(out)
    check_parallel([one.points[0].settings for one in grids], parallel)
    parallel, too_many = runs_at_once([point.settings for one in grids for point in one.points], parallel)
    if too_many is not None:
        progress.note(too_many)
    folders = [out / f"{method}-seed{seed}" for seed in seeds for method in methods]
    date = date_of_all([*folders, *(folder for _, folder in plan.runs())], fresh)
    workshop, tuning = Workshop(progress), None
    if plan.grids:
        if parallel == 1:
            _prepare_new(grids, seeds, out, workshop, date, fresh)
            plan.prepare(workshop, date, fresh=fresh)
        tuning = plan.complete(workshop, date, fresh=fresh, parallel=parallel, progress=progress)
        tuning.write(out)
    planned = _planned(grids, tuning, seeds, out)
    if parallel > 1:
        runs = run_in_processes(planned, parallel, date, fresh=fresh, progress=progress)
    else:
        runs = _one_after_another(planned, workshop, date, fresh, progress)
    stored: dict[str, list[StoredRun]] = {}
    for summary in runs:
        stored.setdefault(summary.method, []).append(read_run(summary.folder))
    result = MethodsComparison(out, tuple(runs), table_of(stored, reference), tuning)
    if tuning is None:
        (out / tuned.FILE).unlink(missing_ok=True)
    durable.write_json(out / "comparison.json", {"format_version": COMPARISON.number, **result.as_dict()})
    return result


def _planned(
    grids: Sequence[MethodGrid], tuning: Tuning | None, seeds: Sequence[int], out: Path
) -> list[tuple[Settings, Path]]:
    """Return settings and folder of every run that is compared, seed by seed."""
    chosen = {} if tuning is None else {one.method: one.chosen for one in tuning.methods}
    return [
        (with_seed(one.points[chosen.get(one.method, 0)].settings, seed), out / f"{one.method}-seed{seed}")
        for seed in seeds
        for one in grids
    ]


def _prepare_new(
    grids: Sequence[MethodGrid], seeds: Sequence[int], out: Path, workshop: Workshop, date: str, fresh: bool
) -> None:
    """Look at what runs that have not begun will need, whatever is chosen: it is missed now, not after the tuning."""
    for settings, folder in _planned(grids, None, seeds, out):
        if fresh or not is_begun(folder):
            Preparation(settings, folder, workshop, fresh, date).complete()


def _one_after_another(
    planned: Sequence[tuple[Settings, Path]], workshop: Workshop, date: str, fresh: bool, progress: Progress
) -> list[RunSummary]:
    runs = list[RunSummary]()
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
    for name, (kind, keys) in FILES.items():
        if not (out / name).exists():
            continue
        try:
            there = durable.read_json(out / name)
        except RunError:
            there = None
        if not isinstance(there, dict) or not keys <= there.keys():
            raise RunError(
                f"{out / name}: expected a file that fedloom wrote, found another, which would be replaced; choose "
                "another --out"
            )
        kind.check(out / name, there.get("format_version", 1), RunError)  # the first files had no number
