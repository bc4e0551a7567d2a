"""Choose each method's settings from a grid, on rows that no run is scored on, before methods are compared."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.assembly.inputs import Workshop
from fedloom.assembly.preparation import Preparation
from fedloom.config import Settings, check
from fedloom.config.grid import GridPoint, MethodGrid
from fedloom.config.setting import shown
from fedloom.config.variants import for_tuning
from fedloom.errors import RunError, SettingsError, TooFewClientsError
from fedloom.experiment.parallel_runs import attempt_in_processes
from fedloom.experiment.run_summary import RunSummary
from fedloom.experiment.session import run
from fedloom.file_formats import TUNING
from fedloom.reporting.metrics import LOSS
from fedloom.reporting.progress import Progress
from fedloom.reporting.tuned import TunedMethod, TunedPoint, Tuning
from fedloom.run_folder.durable import plain

FOLDER = "tuning"
VALIDATION = 0.1
"""Share of the training rows that settings are chosen on."""
_LONGEST = 100


@dataclass(frozen=True)
class TuningPlan:
    """The runs by which settings are chosen: on the rows of one seed, without those that ``scored`` seeds hold out."""

    grids: tuple[MethodGrid, ...]
    skipped: Mapping[str, Mapping[str, str]]
    out: Path
    seed: int
    fraction: float
    scored: tuple[int, ...]

    @classmethod
    def of(
        cls, grids: Sequence[MethodGrid], out: Path, seeds: Sequence[int], seed: int | None, fraction: float | None
    ) -> TuningPlan:
        """Return the plan of a comparison over ``seeds``, every run of it checked; the seed is the first of them.

        Raises:
            SettingsError: nothing is to be chosen, or a run's settings are not valid.
        """
        tuned = tuple(grid for grid in grids if grid.is_tuned)
        for option, value in (("--tune-seed", seed), ("--validation", fraction)):
            if not tuned and value is not None:
                raise SettingsError(f"{option}: expected a --grid with several points, got none; add one, or drop this")
        if seed is not None and (not isinstance(seed, int) or seed < 0):
            raise SettingsError(f"--tune-seed: expected an integer ≥ 0, got {seed}; give one, e.g. 1")
        if fraction is not None and not 0 < fraction < 1:
            raise SettingsError(f"--validation: expected a fraction above 0 and below 1, got {fraction}; give e.g. 0.1")
        if tuned and (given := grids[0].points[0].settings.data.validation_fraction) is not None:
            raise SettingsError(
                f"data.validation_fraction: expected none beside --grid, whose choice is scored on other rows, "
                f"got {given}; drop it, or give --validation {given}"
            )
        skipped = {grid.method: grid.skipped for grid in grids if grid.skipped}
        plan = cls(tuned, skipped, out, seeds[0] if seed is None else seed, fraction or VALIDATION, tuple(seeds))
        for settings, _ in plan.runs():
            check(settings)
        return plan

    def runs(self) -> list[tuple[Settings, Path]]:
        """Return settings and folder of every run, method by method, in the order of the grids."""
        return [(self._settings(point), self._folder(grid, point)) for grid in self.grids for point in grid.points]

    def prepare(self, workshop: Workshop, date: str, *, fresh: bool) -> None:
        """Look at all that the runs need, before the first begins.

        Raises:
            FedloomError: the first thing in the way; nothing was written.
        """
        for settings, folder in self.runs():
            Preparation(settings, folder, workshop, fresh, date).complete()

    def complete(self, workshop: Workshop, date: str, *, fresh: bool, parallel: int, progress: Progress) -> Tuning:
        """Run what is left of the runs, and choose for every method the point of the lowest validation loss.

        Raises:
            FedloomError: as for :func:`fedloom.experiment.run`; a point that does not train is not chosen.
            RunError: none of a method's points trains.
        """
        runs, tried = self.runs(), list[tuple[float | None, str | None, int]]()
        known: Sequence[RunSummary | RunError | None] = [None] * len(runs)
        if parallel > 1:
            known, fresh = attempt_in_processes(runs, parallel, date, fresh=fresh, progress=progress), False
        for number, ((settings, folder), summary) in enumerate(zip(runs, known, strict=True), 1):
            if not isinstance(summary, RunSummary):
                progress.note(f"tuning run {number} of {len(runs)}: {folder.relative_to(self.out / FOLDER)}")
                summary = _trained(settings, folder, date, fresh=fresh, progress=progress, workshop=workshop)
            tried.append(_loss_of(summary))
        remaining = iter(tried)
        methods = [self._chosen(grid, [next(remaining) for _ in grid.points], progress) for grid in self.grids]
        return Tuning(
            format_version=TUNING.number,
            seed=self.seed,
            fraction=self.fraction,
            num_rows=max(rows for _, _, rows in tried),
            methods=methods,
            skipped=plain(self.skipped),
        )

    def _chosen(
        self, grid: MethodGrid, tried: Sequence[tuple[float | None, str | None, int]], progress: Progress
    ) -> TunedMethod:
        points = [
            TunedPoint(
                values=plain(point.values),
                folder=str(self._folder(grid, point).relative_to(self.out)),
                loss_nats=loss,
                reason=reason,
            )
            for point, (loss, reason, _) in zip(grid.points, tried, strict=True)
        ]
        losses = [math.inf if point.loss_nats is None else point.loss_nats for point in points]
        if min(losses) == math.inf:
            raise RunError(
                f"{self.out / FOLDER / grid.method}: expected a point of the grid that trains, got none "
                f"({points[0].title}: {points[0].reason}); choose other values"
            )
        found = TunedMethod(method=grid.method, points=points, chosen=losses.index(min(losses)))
        chosen = points[found.chosen]
        told = f"{grid.method}: chose {chosen.title} by validation loss {min(losses):.4f}"
        progress.note("; ".join([told, *found.edges]))
        return found

    def _settings(self, point: GridPoint) -> Settings:
        return for_tuning(point.settings, self.seed, self.fraction, self.scored)

    def _folder(self, grid: MethodGrid, point: GridPoint) -> Path:
        return self.out / FOLDER / grid.method / folder_name(point.values)


def folder_name(values: Mapping[str, Any]) -> str:
    """Return the name of a point's folder: its values, and their hash where a name cannot hold them."""
    written = ",".join(f"{name}={shown(value)}" for name, value in values.items())
    plainly = re.sub(r"[^\w.,=+-]", "-", written.replace('"', ""))[:_LONGEST]
    exact = plainly == written.replace('"', "")
    return plainly if exact else f"{plainly}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"


def _trained(settings: Settings, folder: Path, date: str, **how: Any) -> RunSummary | TooFewClientsError:
    try:
        return run(settings, folder, date=date, **how)
    except TooFewClientsError as error:  # as of numbers that are not finite: other values may do
        how["progress"].note(f"not chosen: {error}")
        return error


def _loss_of(outcome: RunSummary | TooFewClientsError) -> tuple[float | None, str | None, int]:
    """Return the validation loss, or why there is none, and the rows it is of."""
    if isinstance(outcome, TooFewClientsError):
        return None, "a round had too few usable updates", 0
    loss = outcome.eval.get(LOSS.key)
    if not isinstance(loss, float) or not math.isfinite(loss):
        return None, "its loss is no finite number", 0
    return loss, None, outcome.eval["num_rows"]
