"""Run one experiment into one folder, from its start or from where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fedloom.assembly.inputs import Workshop
from fedloom.assembly.preparation import Preparation
from fedloom.assembly.round_plan import Population
from fedloom.assembly.round_state import standing_in
from fedloom.config import Settings
from fedloom.data.canaries import CANARIES
from fedloom.data.groups import Grouping, grouping_of
from fedloom.data.own_rows import OwnRows
from fedloom.data.sources import Rows
from fedloom.data.tokens import TokenSet
from fedloom.experiment.loop import Loop, LoopKind, loop_of
from fedloom.experiment.round_records import holdings_of, peft_writer
from fedloom.experiment.run_summary import RunSummary
from fedloom.lora.algebra import compress, united
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Standing
from fedloom.methods.state_codec import damage_named
from fedloom.models.load import Base
from fedloom.models.stock_peft import not_read
from fedloom.reporting.peak_memory import reset_device_peak
from fedloom.reporting.progress import Progress, progress_in_notebook
from fedloom.reporting.trackers import TRACKERS, AllTrackers, TensorBoardTracker, TrackedRun, Tracker
from fedloom.results.client_scores import score_clients
from fedloom.results.conversation import wording_of_rows
from fedloom.results.export import write_cards
from fedloom.results.serving_files import write_serving_files
from fedloom.results.state_scores import Score, evaluate_state, score_here, score_state
from fedloom.results.suites import suite_choice_of
from fedloom.run_folder.best_round import Records, best_round, is_over
from fedloom.run_folder.claim import EVALUATION
from fedloom.run_folder.contents import ADAPTER, check_adapter
from fedloom.run_folder.manifest import changed_threads
from fedloom.run_folder.reader import missing_adapters
from fedloom.run_folder.writer import RunFolder
from fedloom.wording import counted, counted_rounds

NOTHING_HELD_OUT = (
    "no rows are held out, so no loss is measured on rows that were not trained on: set data.eval_path, data.eval_rows "
    "or data.eval_fraction"
)


def run(
    settings: Settings,
    out: Path | str,
    *,
    date: str | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    workshop: Workshop | None = None,
) -> RunSummary:
    """Run the settings into ``out``, or resume the run in it, and return the result.

    The day on which it starts, ``date`` or today, is written down, and chat templates are told it ever after. A folder
    is created only once base and rows are loaded and fit, so a mistake leaves nothing behind.

    Raises:
        FedloomError: for anything wrong with the settings, the files they name, or the folder.
    """
    out, progress = Path(out), progress or progress_in_notebook()
    prepared = Preparation(settings, out, workshop or Workshop(progress), fresh, date)
    prepared.complete()
    inputs, placed = prepared.inputs, prepared.placed
    if inputs.held_out is None and NOTHING_HELD_OUT not in prepared.workshop.said:
        prepared.workshop.said.add(NOTHING_HELD_OUT)
        progress.note(NOTHING_HELD_OUT)
    kind = loop_of(prepared)
    # What is written down stays as the user wrote it; what runs has a value per client, in the partition's order.
    with RunFolder.open(out, settings.as_dict(), {"seed": settings.run.seed}, fresh, prepared.folder) as folder:
        folder.confirm_identity(**prepared.identity)
        if not (folder.path / "partition.json").exists():
            if inputs.canaries:
                folder.write_json(CANARIES, {"canaries": [asdict(canary) for canary in inputs.canaries]})
            folder.write_bytes("partition.json", inputs.whole.encoded(inputs.data_sha256))
            ranks = dict(enumerate(placed.client_ranks)) if settings.traits.is_trained else {}
            folder.write_json("holdings.json", holdings_of(inputs.rows, inputs.dealt, ranks, settings.partition.column))
        base, lora = prepared.loaded
        return Session(
            prepared.began, folder, base, lora, inputs, prepared.population, kind, prepared.workshop, progress
        ).complete()


class HeldOutRows(Protocol):
    """What a session evaluates on; None where nothing is held out, or no training rows are here."""

    @property
    def rows(self) -> Rows | None:
        """The training rows."""
        ...

    @property
    def held_out_rows(self) -> Rows | None:
        """The rows."""
        ...

    @property
    def held_out(self) -> TokenSet | None:
        """Their tokens."""
        ...

    @property
    def held_out_sha256(self) -> str | None:
        """Hash of the tokens."""
        ...

    @property
    def own(self) -> OwnRows:
        """Rows of the clients' own."""
        ...


@dataclass
class Session:
    """One process's part of a run: from the last completed round to the end."""

    settings: Settings
    folder: RunFolder
    base: Base
    lora: LoRAModel
    inputs: HeldOutRows
    population: Population
    kind: LoopKind | None
    workshop: Workshop
    progress: Progress

    def complete(self) -> RunSummary:
        """Run what is left, write the adapter, and mark the run as finished."""
        loop = None if self.kind is None else self.kind.resume(self.folder, self._writer(), self.progress)
        state = Standing(0) if loop is None else loop.standing
        finished, left = self.folder.finished, 0 if loop is None else loop.num_rounds - state.round
        if finished is None or (left > 0 and not self._is_over(self.folder.records())):
            base_eval = finished["base_eval"] if finished is not None else self._evaluate_base()
            state = self._released(self._rounds(loop) if loop is not None else state)
            adapters = self._told_if_unread(self._write_adapter(state))
            records = self.folder.records()
            evaluation = records[state.round - 1]["eval"] if records else base_eval
            record = {"method": self.settings.method.name, "base_eval": base_eval, "eval": evaluation}
            chosen = {"released_round": state.round} if self.settings.evaluation.patience is not None else {}
            self.folder.finish(record | chosen | {"adapters": adapters})
        elif missing_adapters(self.folder.path, finished):
            state = self._released(state)
            self.progress.note(f"the adapter is missing: writing it again from the state of round {state.round}")
            self._write_adapter(state)
        else:
            for name in finished.get("adapters", ()):
                check_adapter(self.folder.path, self.folder.manifest, name)
        write_cards(self.folder.path)
        return self._summary(state)

    def _rounds(self, loop: Loop) -> Standing:
        state = loop.standing
        title = f"{self.settings.method.name}, seed {self.settings.run.seed}"
        if before := self.settings.start_rounds:
            title += f", {counted_rounds(loop.num_rounds - before, before)}"
        self.progress.run_started(title, loop.num_rounds, state.round)
        if state.round and (told := changed_threads(self.folder.manifest)) is not None:
            self.progress.note(told)
        with ExitStack() as stack:
            trackers = AllTrackers(self._trackers(state.round))
            stack.callback(trackers.close)
            reset_device_peak()
            # Closed and not left to the collector: an engine may hold processes, which end with the rounds.
            rounds, records = stack.enter_context(closing(loop.rounds(self.evaluate))), self.folder.records()
            while not self._is_over(records) and (done := next(rounds, None)) is not None:
                self.folder.write_round(done.round, done.metrics, done.files, done.writers)
                state = done.standing
                records.append({**done.metrics, "round": done.round})
                trackers.log(done.metrics)
                self.progress.round_done(done.metrics)
                self._prune(records)
        self._prune(records)
        return state

    def _is_over(self, records: Records) -> bool:
        return is_over(records, self.settings.evaluation.patience)

    def _prune(self, records: Records) -> None:
        keep = self.settings.run.keep_states
        if keep != "all":
            keeps_best = keep == "best" or self.settings.evaluation.patience is not None
            self.folder.prune(2, also=best_round(records) if keeps_best else None)

    def _released(self, state: Standing) -> Standing:
        """Return the model that is the result: that of the last round, or of the best where a run may stop early."""
        records, patience = self.folder.records(), self.settings.evaluation.patience
        best = best_round(records)
        if patience is None or best is None or self.kind is None:
            return state
        stopped = f"stopped early: {counted(patience, 'evaluation')} without a lower validation loss; "
        self.progress.note(f"{stopped if self._is_over(records) else ''}the result is that of round {best}")
        if best == state.round:
            return state
        files = self.folder.round_files(best)
        with damage_named(files.folder):
            return standing_in(files)

    def _evaluate_base(self) -> dict[str, Any]:
        """Score the base, once in a comparison, and once more where that is all of the run and its outputs are kept."""
        held_out, is_all = (self.inputs.held_out_sha256, self.inputs.own.sha256), self.kind is None
        score = score_here(self.lora, self.settings.engine.cores)
        return self.workshop.base_scores(self.settings, held_out, lambda: self.evaluate(Standing(0), score), is_all)

    @cached_property
    def _grouping(self) -> Grouping | None:
        rows = self.inputs.held_out_rows
        return None if rows is None else grouping_of(rows, self.settings.partition.column)

    def evaluate(self, state: Standing, score: Score) -> dict[str, Any]:
        """Score a state on what is held out, and by the suites."""
        chosen, inputs = self.settings.evaluation, self.inputs
        scores = evaluate_state(score, state, inputs.held_out, chosen.batch_tokens, self._grouping)
        scores |= score_clients(score, self._for_clients(state), inputs.own, chosen.batch_tokens)
        if chosen.suites:
            choice, folder = suite_choice_of(self.settings), self.folder.path / EVALUATION
            scores["suites"] = score_state(
                self.lora,
                self.base.tokenizer,
                state,
                chosen.suites,
                choice,
                inputs.held_out_rows,
                folder,
                self.progress.scored,
            )
        return scores

    def _for_clients(self, state: Standing) -> Standing:
        """Return the model as clients have it: that of the one who owns all rows is everybody's."""
        pooled = self.settings.traits.pools_rows and state.own
        return Standing(state.round, shared=state.own[0]) if pooled else state

    def _write_adapter(self, state: Standing) -> list[str]:
        """Write the result as PEFT: one adapter on the untouched base, or one per client where each has its own.

        Return the folders, relative to the run's; none where training added nothing.
        """
        write_peft, scales, ground = self._writer(), self.population.scales, self.lora.ground
        own = {client: united([ground, adapter]) for client, adapter in sorted(state.own.items())}
        rows, tokenizer = self.inputs.rows or self.inputs.held_out_rows, self.base.tokenizer
        wording = wording_of_rows(self.settings.data, rows, tokenizer)
        result = compress(united([ground, state.shared])).adapter

        def write(adapter: Adapter, path: Path, scale: float) -> None:
            write_peft(adapter, path, scale)
            write_serving_files(path, self.base.model, tokenizer, wording)

        def write_own(path: Path) -> None:
            for client, adapter in own.items():
                write(adapter, path if len(own) == 1 else path / f"client-{client}", scales[client])

        if own:
            self.folder.write_folder(ADAPTER, write_own)
            return [ADAPTER] if len(own) == 1 else [f"{ADAPTER}/client-{client}" for client in own]
        if any(rank > 0 for rank in result.ranks.values()):
            self.folder.write_folder(ADAPTER, lambda path: write(result, path, 1.0))
            return [ADAPTER]
        return []

    def _writer(self) -> Callable[[Adapter, Path, float], None]:
        base = BaseReference.of(self.settings.model.base, self.base.revision_hash)
        return peft_writer(base, self.lora, self.settings.training.dropout)

    def _told_if_unread(self, adapters: list[str]) -> list[str]:
        """Say which modules of the result stock peft would not load on this base."""
        trusted = self.settings.model.trust_remote_code
        for name in adapters[:1]:
            unread = not_read(self.folder.path / name, self.base.model.config, trust_remote_code=trusted)
            if unread is not None:
                self.progress.note(unread)
        return adapters

    def _trackers(self, num_rounds_done: int) -> list[Tracker]:
        trackers: list[Tracker] = [TensorBoardTracker(self.folder.path / "tensorboard", num_rounds_done)]
        path, chosen = self.folder.path, self.settings.run
        tracked = TrackedRun(
            id=self.folder.manifest["run"],
            name=path.resolve().name,
            folder=path,
            config=self.settings.as_dict(),
            project=chosen.project,
            group=chosen.group,
            tags=chosen.tags or None,
        )
        return trackers + [TRACKERS[name](tracked) for name in chosen.trackers]

    def _summary(self, state: Standing) -> RunSummary:
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
            peak_device_memory_bytes=max((r.get("peak_device_memory_bytes") or 0 for r in records), default=0) or None,
            aggregation_noise=records[-1]["aggregation_noise"] if records else None,
            rank=max(state.shared.ranks.values(), default=0),
            privacy=records[-1].get("privacy") if records else None,
            start_rounds=min(self.settings.start_rounds, len(records)),
        )
