"""A study of a model that is cut: what its server is made of, and its periods over the sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedloom import embedded
from fedloom.assembly.inputs import Workshop, lora_of
from fedloom.assembly.round_plan import Population, rules_of
from fedloom.assembly.split_run import SplitRun, segment_strategy, split_plan
from fedloom.experiment.loop import Loop, LoopKind, SplitPeriods, WriteAdapter, restored_split
from fedloom.federation.blob import largest_message
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.methods.strategy import Strategy
from fedloom.models.base_folder import resolve_folder
from fedloom.models.cut import cut, verify_cut
from fedloom.models.load import Base, find_base
from fedloom.models.partial_load import server_part, skeleton
from fedloom.models.threads import compute_with
from fedloom.reporting.progress import Progress
from fedloom.run_folder.writer import RunFolder
from fedloom.sites.remote_split_clients import RemoteSplitClients
from fedloom.sites.sheet import ClientCut, SheetSplit
from fedloom.sites.site_holdings import write_holdings
from fedloom.sites.sites_engine import Attendance
from fedloom.sites.study import Study
from fedloom.split.cut_messages import largest_split_message
from fedloom.split.lockstep import SplitRecord
from fedloom.split.parties import SplitParties
from fedloom.split.party import adamw
from fedloom.split.plan import Segment, SplitPlan, block_of, segments, server_shapes
from fedloom.split.server_half import SplitServer
from fedloom.training.output_head import OutputHead, read_output_head
from fedloom.training.verified_head import output_head


def served_base(study: Study, workshop: Workshop) -> tuple[Base, LoRAModel]:
    """Return the base that a study's server holds: of a cut model its own blocks, unless it scores the whole.

    Raises:
        FedloomError: the base cannot be loaded or cut.
    """
    settings, model = study.settings, study.settings.model
    if not settings.traits.is_cut or settings.data.eval_path is not None:
        return workshop.base(study.written)
    compute_with(settings.engine.threads)
    found = find_base(
        model.base,
        tokenizer=model.tokenizer,
        device=model.device,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    tail = settings.split.tail_blocks if settings.split.labels == "client" else None
    lowest = min(settings.per_client(settings.split.cut_layer))
    workshop.progress.note(f"loading the server's blocks of base {model.base}")
    part: Any = server_part(found, lowest, tail, dtype=model.dtype, quantization=model.quantization)
    lora = lora_of(skeleton(found.path, found.is_trusted), model.target_modules, part)
    return Base(part, found.tokenizer, found.name, found.revision_hash, part.dtype, found.device), lora


class CutStudy:
    """A study of a cut model before its sites are there: the plan, who trains what, and each site's part."""

    def __init__(self, study: Study, lora: LoRAModel, rows: Mapping[int, int]) -> None:
        settings, model = study.settings, study.settings.model
        self._settings, self._lora, self._study = settings, lora, study
        self.plan: SplitPlan = split_plan(settings, rows)
        # The base is here and was checked and hashed when the server's blocks were loaded; only shapes are wanted.
        folder = resolve_folder(str(embedded.base_path(model.base)), model.revision, model.trust_remote_code)
        whole = skeleton(folder, model.trust_remote_code)
        shapes = lora_of(whole, model.target_modules).shapes
        self.plan.check(whole, shapes)
        self._segments = segments(self.plan, whole, shapes)
        self._server_shapes = server_shapes(self.plan, whole, shapes)
        self._shapes = shapes
        self._blocks = {module: block_of(whole, module) for module in shapes}
        self._server = SplitServer(lora, self._head(), self.plan, adamw)

    @property
    def num_rounds(self) -> int:
        """Periods in all."""
        return self.plan.num_rounds

    def largest_body(self) -> int:
        """Return the most bytes that a site can send at once, for the link to take in."""
        plan, shapes = self.plan, self._shapes
        numbers = max(plan.ranks) * sum(num_out + num_in for num_out, num_in in shapes.values())
        passing = largest_split_message(plan.training.batch_size * self._server.max_length, self._server.width)
        return max(passing, largest_message(2 * len(shapes), 4 * numbers))

    def client_cut(self, client: int) -> ClientCut:
        """Return a site's part."""
        plan = self.plan
        own = [segment for segment in self._segments if client in segment.owners]
        split = SheetSplit(
            cut_layer=plan.cut_layers[client],
            tail_blocks=plan.tail_blocks,
            segments=tuple(tuple(sorted({self._blocks[name] for name in part.shapes})) for part in own),
            client_half=plan.client_half,
            num_steps=plan.num_steps,
            aggregate_every=plan.aggregate_every,
            micro_batches=plan.micro_batches,
            wire_dtype=plan.wire_dtype,
            gradient_wire_dtype=plan.gradient_wire_dtype,
            error_feedback=plan.error_feedback,
        )
        return ClientCut(plan.ranks[client], plan.scales[client], split)

    def run_over(self, attendance: Attendance) -> tuple[SplitRun, RemoteSplitClients]:
        """Return the run whose clients are the sites."""
        plan, lora = self.plan, self._lora
        slot = Slot(plan.server_rank, plan.server_scale)

        def strategy_of(segment: Segment) -> Strategy:
            return parties.strategy(segment)

        clients = RemoteSplitClients(
            attendance=attendance,
            plan=plan,
            segments=self._segments,
            strategy_of=strategy_of,
            width=self._server.width,
            max_length=self._server.max_length,
            deadline_s=self._study.sites.step_deadline_s,
        )
        parties = SplitParties(
            plan=plan,
            segments=self._segments,
            server_shapes=self._server_shapes,
            server=self._server,
            clients=clients,
            make_strategy=partial(segment_strategy, self._settings),
            rules=rules_of(self._settings, self._server_shapes),
            open_slots=lambda cohort: lora.open([slot]),
        )
        run = SplitRun(parties, self._study.sites.names, self._settings.evaluation.every)
        return run, clients

    def _head(self) -> OutputHead | None:
        """Return the head where the server has it; head and cuts are checked where the whole model is there for it."""
        model, is_whole = self._lora.model, self._settings.data.eval_path is not None
        if is_whole:
            self._lora.close()
            for cut_layer in sorted(set(self.plan.cut_layers)):
                verify_cut(model, cut(model, cut_layer))
            self._lora.route_all(None)
        if self.plan.tail_blocks is not None:
            return None
        return output_head(model) if is_whole else read_output_head(model)


@dataclass(frozen=True, eq=False)
class CutKind(LoopKind):
    """A loop of periods whose clients are sites."""

    engine: Attendance
    clients: RemoteSplitClients

    def resume(self, folder: RunFolder, write_adapter: WriteAdapter, progress: Progress) -> Loop:
        """Wait for the quorum, and return the loop at the point that the folder has reached."""
        assert self.split is not None
        engine = self.engine
        self.clients.state = state = restored_split(self.split, folder)
        engine.counted |= {
            client["client"]: record["round"]
            for record in folder.records()
            for client in record["clients"]
            if client["left_at"] is None
        }
        if state.round < self.split.num_rounds:
            engine.wait_for(engine.patience.quorum, engine.patience.deadline_s)
        write_holdings(folder, self.population)
        return CutPeriods(
            self.settings.method.name, self.split, self.lora, state, progress, self, folder, self.population
        )


@dataclass(frozen=True, eq=False)
class CutPeriods(SplitPeriods):
    """Periods whose clients are sites."""

    kind: CutKind
    folder: RunFolder
    population: Population

    def metrics(self, record: SplitRecord) -> dict[str, Any]:
        """Return the period's record with a part per site, show it, and note who took part to the end."""
        metrics, engine = super().metrics(record), self.kind.engine
        self.kind.clients.state = record.state
        engine.counted |= {client.client: record.round for client in record.clients if client.left_at is None}
        for client in record.clients:
            site = engine.sites[engine.names[client.client]]
            if client.reason is not None:
                site.left_out = client.reason
            elif client.stats is not None:
                site.last_loss = client.stats.loss_nats
        engine.catch_up()
        metrics["sites"] = engine.report()
        for line in engine.lines():
            self.progress.note(f"  {line}")
        write_holdings(self.folder, self.population)
        return metrics
