"""Run one experiment into one folder, from its start or from where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.aggregation.records import Broadcast, ServerState, Update
from fedloom.config import Settings
from fedloom.experiment.assembly import CONTROLS, Population, engine_of, plan_of, population_of, training_of
from fedloom.experiment.evaluating import evaluate_state, score_state
from fedloom.experiment.inputs import Inputs, Workshop, base_path
from fedloom.experiment.recording import UpdateKeeper, holdings_of, metrics_of, peft_writer, update_keeper
from fedloom.experiment.state_files import NUMBERS, OPTIMISERS, TENSORS, read_optimisers, read_state, state_files
from fedloom.experiment.suites import suite_choice_of
from fedloom.federation.rounds import Arrival, Engine, RoundPlan, RoundRecord, run_rounds
from fedloom.lora.algebra import compress
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.models.load import Base
from fedloom.reporting.progress import Progress, SilentProgress
from fedloom.reporting.run_folder import MAY_CHANGE, RunFolder, Writer
from fedloom.reporting.run_opening import refuse_foreign
from fedloom.reporting.tables import written_bytes
from fedloom.reporting.trackers import AllTrackers, MlflowTracker, TensorBoardTracker, Tracker, WandbTracker
from fedloom.training.local import StepReport


@dataclass(frozen=True)
class RunSummary:
    """What a finished run came to."""

    folder: Path
    method: str
    seed: int
    num_rounds: int
    base_eval: Mapping[str, Any]
    eval: Mapping[str, Any]
    upload_bytes: int
    download_bytes: int
    seconds: float
    peak_memory_bytes: int
    aggregation_noise: float | None
    rank: int

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {**self.__dict__, "folder": str(self.folder), "base_eval": dict(self.base_eval), "eval": dict(self.eval)}

    def lines(self) -> list[str]:
        """Return the summary for people."""
        lines = [f"{self.method}, seed {self.seed}: {self.num_rounds} rounds in {self.seconds:.1f} s"]
        if "loss_nats" in self.eval:
            before = f" (base {self.base_eval['loss_nats']:.4f})" if "loss_nats" in self.base_eval else ""
            tokens = f"{self.eval['num_loss_tokens']:,} tokens of {self.eval['num_rows']:,} rows"
            lines.append(f"held-out loss {self.eval['loss_nats']:.4f} nats per token{before} on {tokens}")
        for suite, scores in self.eval.get("suites", {}).items():
            figures = ", ".join(f"{name} {found['value']:.4f}" for name, found in scores["metrics"].items())
            lines.append(f"{suite}: {figures}")
        up, down = written_bytes(self.upload_bytes), written_bytes(self.download_bytes)
        lines.append(f"bytes up {up}, down {down}; peak memory {written_bytes(self.peak_memory_bytes)}")
        if self.aggregation_noise is not None:
            lines.append(f"aggregation noise of the last round {self.aggregation_noise:.3g}")
        return lines


def run(
    settings: Settings,
    out: Path,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    workshop: Workshop | None = None,
) -> RunSummary:
    """Run the settings into ``out``, or go on with the run that is there, and return what it came to.

    A folder is created only once base and rows are loaded and fit, so a mistake leaves nothing behind.

    Raises:
        FedloomError: for anything wrong with the settings, the files they name, or the folder.
    """
    progress, workshop = progress or SilentProgress(), workshop or Workshop()
    refuse_foreign(out)
    progress.note(f"loading base {settings.model.base}")
    base, lora = workshop.base(settings)
    saved = out / "partition.json"
    progress.note(f"reading rows of {settings.data.path}")
    inputs = workshop.inputs(settings, base, saved if saved.exists() and not fresh else None)
    population = population_of(settings, inputs)
    plan = None if settings.method.name == "base" else plan_of(settings, population, lora)
    may_change = MAY_CHANGE if is_extensible(settings) else tuple(set(MAY_CHANGE) - {"federation.num_rounds"})
    with RunFolder.open(out, settings.as_dict(), {"seed": settings.run.seed}, fresh, may_change) as folder:
        folder.confirm_identity(
            base_sha256=base.revision_hash,
            data_sha256=inputs.data_sha256,
            held_out_sha256=inputs.held_out_sha256,
            partition_sha256=inputs.partition_sha256,
            row_counts=inputs.counts.__dict__,
        )
        if not (folder.path / "partition.json").exists():
            inputs.partition.save(folder.path / "partition.json", inputs.data_sha256)
            ranks = dict(enumerate(settings.client_ranks))
            folder.write_json(
                "holdings.json", holdings_of(inputs.rows, inputs.partition, ranks, settings.partition.column)
            )
        return Session(settings, folder, base, lora, inputs, population, plan, progress).complete()


def is_extensible(settings: Settings) -> bool:
    """Tell whether more rounds leave the rounds before as they are: not where one schedule spans the run."""
    return settings.training.schedule == "constant" or training_of(settings).schedule_span == "round"


@dataclass
class Session:
    """One process's part of a run: from the last completed round to the end."""

    settings: Settings
    folder: RunFolder
    base: Base
    lora: LoRAModel
    inputs: Inputs
    population: Population
    plan: RoundPlan | None
    progress: Progress

    def complete(self) -> RunSummary:
        """Run what is left, write the adapter, and mark the run as finished."""
        base_eval = self._evaluate(ServerState())
        state = self._rounds(self.plan) if self.plan is not None else ServerState()
        finished = self.folder.finished
        if finished is None or finished["round"] != self.folder.last_round():
            self._write_adapter(state)
            evaluation = self.folder.records()[-1]["eval"] if self.folder.records() else base_eval
            self.folder.finish({"method": self.settings.method.name, "base_eval": base_eval, "eval": evaluation})
        return self._summary(state)

    def _rounds(self, plan: RoundPlan) -> ServerState:
        state, optimisers = self._restore(plan)
        engine = engine_of(self.settings, self.population, self.lora, optimisers, self._on_step)
        title = f"{self.settings.method.name}, seed {self.settings.run.seed}"
        self.progress.run_started(title, plan.num_rounds, state.round)
        with ExitStack() as stack:
            trackers = AllTrackers(self._trackers(state.round))
            stack.callback(trackers.close)
            keeper = None
            if self.settings.run.keep_updates:
                scales = self.population.scales
                keeper = stack.enter_context(update_keeper(self.folder.path, self._writer(), scales.__getitem__))
            shown = ShownEngine(engine, self.progress)
            keep = keeper.keep if keeper is not None else _drop
            for record in run_rounds(state, plan, shown, self._evaluate, keep):
                self._write_round(record, keeper, optimisers, trackers)
                state = record.state
        return state

    def _restore(self, plan: RoundPlan) -> tuple[ServerState, dict[int, dict[str, Tensor]] | None]:
        """Return the last completed round's state, or the initial one."""
        optimisers: dict[int, dict[str, Tensor]] | None = {} if self.settings.method.name in CONTROLS else None
        last = self.folder.last_round()
        if last is None:
            return plan.strategy.initial(), optimisers
        read = partial(self.folder.read_round_file, last)
        if optimisers is not None:
            optimisers = read_optimisers(read(OPTIMISERS))
        return read_state(read(TENSORS), read(NUMBERS)), optimisers

    def _write_round(
        self,
        record: RoundRecord,
        keeper: UpdateKeeper | None,
        optimisers: dict[int, dict[str, Tensor]] | None,
        trackers: AllTrackers,
    ) -> None:
        metrics = metrics_of(record, self.settings.method.name, self.population.names)
        writers: dict[str, Writer] = {}
        if keeper is not None:
            writers["clients"] = partial(keeper.move_into, clients=record.clients)
            if record.applied:
                writers["global"] = lambda path: self._writer()(record.applied, path, 1.0)
        self.folder.write_round(record.round, metrics, state_files(record.state, optimisers), writers)
        if not self.settings.run.keep_states:
            self.folder.prune(2)
        trackers.log(metrics)
        self.progress.round_done(metrics)

    def _evaluate(self, state: ServerState) -> dict[str, Any]:
        chosen, inputs = self.settings.evaluation, self.inputs
        scores = evaluate_state(self.lora, state, inputs.held_out, chosen.batch_tokens)
        if chosen.suites:
            choice, folder = suite_choice_of(self.settings), self.folder.path / "evaluation"
            scores["suites"] = score_state(
                self.lora, self.base.tokenizer, state, chosen.suites, choice, inputs.held_out_rows, folder
            )
        return scores

    def _write_adapter(self, state: ServerState) -> None:
        """Write the result as PEFT: one adapter on the untouched base, or one per client where each has its own."""
        write, scales, own = self._writer(), self.population.scales, dict(sorted(state.own.items()))
        result = compress(state.global_adapter()).adapter

        def write_own(path: Path) -> None:
            for client, adapter in own.items():
                write(adapter, path if len(own) == 1 else path / f"client-{client}", scales[client])

        if own:
            self.folder.write_folder("adapter", write_own)
        elif any(rank > 0 for rank in result.ranks.values()):
            self.folder.write_folder("adapter", lambda path: write(result, path, 1.0))

    def _writer(self) -> Callable[[Adapter, Path, float], None]:
        return peft_writer(str(base_path(self.settings)), self.lora.uses_conv1d, self.settings.training.dropout)

    def _trackers(self, num_rounds_done: int) -> list[Tracker]:
        trackers: list[Tracker] = [TensorBoardTracker(self.folder.path / "tensorboard", num_rounds_done)]
        kinds: dict[str, type[WandbTracker] | type[MlflowTracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
        named = ("fedloom", self.folder.path.name, self.settings.as_dict())
        return trackers + [kinds[name](*named) for name in self.settings.run.trackers]

    def _on_step(self, report: StepReport) -> None:
        self.progress.step_done(report.client, report.step, report.num_steps, report.loss_nats)

    def _summary(self, state: ServerState) -> RunSummary:
        records, finished = self.folder.records(), self.folder.finished or {}
        return RunSummary(
            folder=self.folder.path,
            method=self.settings.method.name,
            seed=self.settings.run.seed,
            num_rounds=len(records),
            base_eval=finished["base_eval"],
            eval=finished["eval"] or {},
            upload_bytes=sum(record["upload_bytes"] for record in records),
            download_bytes=sum(record["download_bytes"] for record in records),
            seconds=sum(sum(record["seconds"].values()) for record in records),
            peak_memory_bytes=max((record["peak_memory_bytes"] for record in records), default=0),
            aggregation_noise=records[-1]["aggregation_noise"] if records else None,
            rank=max(state.global_adapter().ranks.values(), default=0),
        )


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
            self.progress.client_done(outcome.client, outcome.loss_nats if isinstance(outcome, Update) else None)
            yield arrival


def _drop(update: Update) -> None:
    """Keep nothing of an update."""
