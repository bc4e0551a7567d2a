"""The loops a run can be made of, behind one face: where it stands, and what each further round leaves to write."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from fedloom.assembly.engine_choice import Surroundings, engine_of, trains_here
from fedloom.assembly.inputs import Inputs
from fedloom.assembly.preparation import Preparation
from fedloom.assembly.round_plan import SEED, Drawn, Population
from fedloom.assembly.round_state import read_round, round_files, standing_of
from fedloom.assembly.split_run import NUMBERS as SPLIT_NUMBERS
from fedloom.assembly.split_run import TENSORS as SPLIT_TENSORS
from fedloom.assembly.split_run import (
    SplitRun,
    read_split_state,
    split_metrics,
    split_run,
    split_state_files,
)
from fedloom.clients.memory import Memory
from fedloom.config import Settings
from fedloom.engines.running import RunningEngine
from fedloom.experiment.booked_clients import ClientBooks, client_books_of, within_budget
from fedloom.experiment.booked_engine import BookedEngine, PrivacyBooks, books_of, with_privacy
from fedloom.experiment.round_records import UpdateKeeper, metrics_of, update_keeper
from fedloom.federation.intake import Arrival
from fedloom.federation.rounds import Engine, RoundPlan, RoundRecord, run_rounds
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, ServerState, Standing, Update
from fedloom.methods.state_codec import damage_named
from fedloom.models.load import Base
from fedloom.reporting.progress import Progress
from fedloom.results.state_scores import Score, score_here
from fedloom.run_folder.writer import RunFolder, Writer
from fedloom.split.lockstep import SplitRecord
from fedloom.split.plan import SplitPlan
from fedloom.split.split_state import SplitState
from fedloom.training.cohort_round import StepReport

Evaluate = Callable[[Standing, Score], Mapping[str, Any]]
WriteAdapter = Callable[[Adapter, Path, float], None]


@dataclass(frozen=True, eq=False)
class Completed:
    """A round that has ended: its metrics, the files and folders that make it resumable, and the model it left."""

    round: int
    metrics: Mapping[str, Any]
    files: Mapping[str, bytes]
    writers: Mapping[str, Writer]
    standing: Standing


class Loop(Protocol):
    """A run's rounds. ``standing`` is the model as the last completed round left it."""

    @property
    def num_rounds(self) -> int:
        """Rounds in all."""
        ...

    @property
    def standing(self) -> Standing:
        """The model to go on from."""
        ...

    def rounds(self, evaluate: Evaluate) -> Generator[Completed]:
        """Run what is left, one round at a time; to be closed, because an engine may hold processes."""
        ...


def loop_of(prepared: Preparation) -> LoopKind | None:
    """Return the loop of what was prepared; None where nothing is trained.

    Raises:
        CutError: if the base does not compute the same when it is cut.
        PrivacyError: the budget of hidden clients is not enough for a round.
    """
    (base, lora), settings, inputs = prepared.loaded, prepared.placed, prepared.inputs
    match prepared.plan:
        case None:
            return None
        case SplitPlan() as plan:
            split = split_run(settings, inputs, lora, plan)
            return LoopKind(settings, inputs, base, lora, prepared.population, None, split)
        case plan:
            plan = within_budget(settings, plan, prepared.workshop.progress)
            return LoopKind(settings, inputs, base, lora, prepared.population, plan, None)


@dataclass(frozen=True, eq=False)
class LoopKind:
    """A loop that is set up but does not know its folder yet; no ``inputs`` where the rows are elsewhere."""

    settings: Settings
    inputs: Inputs | None
    base: Base
    lora: LoRAModel
    population: Population
    plan: RoundPlan | None
    split: SplitRun | None

    @property
    def draws(self) -> Drawn:
        """Where a server's noise comes from: rounds in one process or on a cluster are a simulation."""
        return SEED

    @property
    def num_rounds(self) -> int:
        """Rounds in all."""
        if self.split is not None:
            return self.split.num_rounds
        assert self.plan is not None
        return self.plan.num_rounds

    def resume(self, folder: RunFolder, write_adapter: WriteAdapter, progress: Progress) -> Loop:
        """Return the loop at the point that the folder has reached."""
        if self.split is not None:
            if self.settings.engine.name == "ray":
                progress.note(trains_here(self.settings))
            return SplitPeriods(
                self.settings.method.name, self.split, self.lora, restored_split(self.split, folder), progress
            )
        assert self.plan is not None
        state, memories, last = self.plan.strategy.initial(), dict[int, Memory](), folder.last_round()
        if last is not None:
            with damage_named(folder.round_path(last)):
                state, memories = read_round(folder.round_files(last))
        return AdapterRounds(self, self.plan, state, memories, folder.path, write_adapter, progress)


def restored_split(run: SplitRun, folder: RunFolder) -> SplitState:
    """Return the last completed period's state, or the initial one."""
    last = folder.last_round()
    if last is None:
        return run.initial()
    with damage_named(folder.round_path(last)):
        files = folder.round_files(last)
        return read_split_state(files.read(SPLIT_TENSORS), files.read(SPLIT_NUMBERS))


@dataclass(frozen=True, eq=False)
class AdapterRounds:
    """Rounds in which adapters cross: every method but the split one."""

    kind: LoopKind
    plan: RoundPlan
    state: ServerState
    memories: dict[int, Memory]
    path: Path
    write_adapter: WriteAdapter
    progress: Progress

    @property
    def num_rounds(self) -> int:
        """Rounds in all."""
        return self.plan.num_rounds

    @property
    def standing(self) -> Standing:
        """The model to go on from."""
        return standing_of(self.state, self.memories)

    def rounds(self, evaluate: Evaluate) -> Generator[Completed]:
        """Run what is left, one round at a time."""
        settings, population = self.kind.settings, self.kind.population
        with ExitStack() as stack:
            engine = stack.enter_context(self.engine())
            shown = ShownEngine(engine if self.books is None else BookedEngine(engine, self.books), self.progress)
            keeper = None
            if settings.run.keep_updates:
                scales = population.scales
                keeper = stack.enter_context(update_keeper(self.path, self.write_adapter, scales.__getitem__))
            keep = keeper.keep if keeper is not None else _drop

            def scored(state: ServerState) -> Mapping[str, Any]:
                return evaluate(standing_of(state, engine.held()), engine.row_losses)

            plan = self.plan if self.client_books is None else self.client_books.booked(self.plan)
            for record in run_rounds(self.state, plan, shown, scored, keep):
                metrics = {**self.metrics(record), "clients_at_once": engine.clients_at_once}
                files, standing = round_files(record.state, engine.held()), standing_of(record.state, engine.held())
                yield Completed(record.round, metrics, files, self._writers(record, keeper), standing)

    def engine(self) -> AbstractContextManager[RunningEngine]:
        """Return where clients live, to be started."""
        kind, half = self.kind, self.plan.strategy.client
        assert kind.inputs is not None
        around = Surroundings(kind.base, kind.lora, kind.inputs, kind.population, self._on_step, self.progress.note)
        return engine_of(kind.settings, around, half, self.state, self.memories)

    def metrics(self, record: RoundRecord) -> dict[str, Any]:
        """Return a round's record; called once a round, before the next one begins."""
        metrics = metrics_of(record, self.kind.settings.method.name, self.kind.population.names)
        return with_privacy(metrics, self.books) if self.client_books is None else self.client_books.told(metrics)

    @cached_property
    def books(self) -> PrivacyBooks | None:
        """What clients have spent of their privacy; None where rows are not hidden, or each site keeps its own."""
        kind = self.kind
        return None if kind.inputs is None else books_of(kind.settings, kind.population, self.path)

    @cached_property
    def client_books(self) -> ClientBooks | None:
        """What clients have spent that are hidden as a whole; None where none is."""
        return client_books_of(self.kind.settings, self.path, self.kind.draws)

    def _writers(self, record: RoundRecord, keeper: UpdateKeeper | None) -> dict[str, Writer]:
        if keeper is None:
            return {}
        writers: dict[str, Writer] = {"clients": partial(keeper.move_into, clients=record.clients)}
        if record.applied:
            writers["global"] = lambda path: self.write_adapter(record.applied, path, 1.0)
        return writers

    def _on_step(self, report: StepReport) -> None:
        self.progress.step_done(report.client, report.step, report.num_steps, report.loss_nats)


@dataclass(frozen=True, eq=False)
class SplitPeriods:
    """Periods between aggregations of a model cut in two."""

    method: str
    run: SplitRun
    lora: LoRAModel
    state: SplitState
    progress: Progress

    @property
    def num_rounds(self) -> int:
        """Periods in all."""
        return self.run.num_rounds

    @property
    def standing(self) -> Standing:
        """Both halves as one model."""
        return self.state.standing()

    def rounds(self, evaluate: Evaluate) -> Generator[Completed]:
        """Run what is left, one period at a time."""
        score = score_here(self.lora)
        for record in self.run.periods(self.state, lambda state: evaluate(state.standing(), score), self._on_step):
            metrics, files = self.metrics(record), split_state_files(record.state)
            yield Completed(record.round, metrics, files, {}, record.state.standing())

    def metrics(self, record: SplitRecord) -> dict[str, Any]:
        """Return a period's record; called once a period, before the next one begins."""
        return split_metrics(record, self.method, self.run.names)

    def _on_step(self, step: int, loss_nats: float) -> None:
        """Show the cohort's joint step as the server's."""
        every = self.run.parties.plan.aggregate_every
        if step % every == 0:
            self.progress.round_started(step // every + 1, len(self.run.names))
        self.progress.step_done(0, step % every + 1, every, loss_nats)


@dataclass(frozen=True)
class ShownEngine:
    """An engine whose rounds and clients a person can watch."""

    engine: Engine
    progress: Progress

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Train as the engine does, and say so."""
        if broadcasts:
            self.progress.round_started(broadcasts[0].round, len(broadcasts))
        for arrival in self.engine.train(broadcasts):
            outcome = arrival.outcome
            loss = None
            if isinstance(outcome, Update):
                loss = outcome.stats.loss_nats if outcome.stats.tells_loss else math.nan
            self.progress.client_done(outcome.client, loss)
            yield arrival


def _drop(update: Update) -> None:
    """Keep nothing of an update."""
