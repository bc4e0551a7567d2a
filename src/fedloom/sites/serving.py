"""Run a study at the server, into an ordinary run folder: what ``experiment.run`` does, with the clients elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedloom.assembly.inputs import Workshop
from fedloom.assembly.preparation import check_folder, refuse_fewer_rounds
from fedloom.assembly.round_plan import SYSTEM, Drawn, Population, cohorts, plan_of
from fedloom.data.own_rows import OwnRows
from fedloom.data.sources import Rows
from fedloom.data.tokenizer import fingerprint
from fedloom.data.tokens import TokenSet
from fedloom.errors import RunError
from fedloom.experiment.booked_clients import within_budget
from fedloom.experiment.booked_engine import privacy_record
from fedloom.experiment.loop import AdapterRounds, Loop, LoopKind, WriteAdapter
from fedloom.experiment.run_summary import RunSummary
from fedloom.experiment.session import NOTHING_HELD_OUT, Session
from fedloom.federation.blob import WireDtype, largest_message
from fedloom.federation.rounds import RoundPlan, RoundRecord
from fedloom.lora.layer import LoRAModel
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.state import Standing
from fedloom.models.causal import longest_row
from fedloom.models.load import Base
from fedloom.privacy.accountant import check_accountant
from fedloom.reporting.progress import Progress, SilentProgress
from fedloom.results.state_scores import Score
from fedloom.run_folder.claim import is_begun
from fedloom.run_folder.manifest import read_manifest
from fedloom.run_folder.run_date import date_in, today
from fedloom.run_folder.writer import RunFolder
from fedloom.sites.frames import MAX_HEAD_BYTES
from fedloom.sites.kit import read_kit
from fedloom.sites.link import Link
from fedloom.sites.sheet import sheet_of
from fedloom.sites.site_holdings import write_holdings
from fedloom.sites.site_identity import named, verifier_of
from fedloom.sites.site_scores import scored_by_sites
from fedloom.sites.sites_engine import Attendance, Patience, SitesEngine
from fedloom.sites.sites_sum import largest_sum_message
from fedloom.sites.split_serving import CutKind, CutStudy, served_base
from fedloom.sites.study import Study
from fedloom.sites.study_versions import check_version, note_version

OpenLink = Callable[[Study, int], Link]
"""Opens the server's end, given the study and the most bytes that a frame of a site can have."""


@dataclass(frozen=True, eq=False)
class _HeldOut:
    held_out_rows: Rows | None
    held_out: TokenSet | None
    held_out_sha256: str | None
    rows: Rows | None = None
    own: OwnRows = field(default_factory=OwnRows)


def serve(
    study: Study,
    out: Path | str,
    open_link: OpenLink,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    workshop: Workshop | None = None,
) -> RunSummary:
    """Run a study into ``out``, or go on with the run in it, and return the result.

    Raises:
        FedloomError: for anything wrong with the study, the folder, the link, or too few sites.
    """
    out, progress = Path(out), progress or SilentProgress()
    workshop = workshop or Workshop(progress)
    settings = study.written
    may_change = check_folder(out, settings, fresh, check_version(study, out, fresh))
    study = study.on(date_in(out, fresh) or today())
    base, lora = served_base(study, workshop)
    longest_row(study.settings.data.max_length, base.model.config)  # every site would refuse the study
    held_out = _held_out(study, workshop, base)
    if held_out.held_out is None and study.sites.evaluate == "server":
        progress.note(NOTHING_HELD_OUT)
    served = _Served(study, base, lora, progress, open_link)
    if not fresh:
        refuse_fewer_rounds(out, served.num_rounds)
    identity = {"seed": settings.run.seed, "run_id": _run_id(out, fresh)}
    with RunFolder.open(out, settings.as_dict(), identity, fresh, may_change) as folder:
        folder.confirm_identity(
            date=study.settings.data.date,
            base_sha256=base.revision_hash,
            tokenizer_sha256=served.tokenizer_sha256,
            held_out_sha256=held_out.held_out_sha256,
        )
        note_version(study, folder)
        with served.started(folder) as kind:
            session = SitesSession(
                study.written, folder, base, lora, held_out, served.population, kind, workshop, progress
            )
            session.engine, session.scores_at_sites = kind.engine, study.sites.evaluate == "sites"
            summary = session.complete()
            kind.engine.end()
            return summary


class _Served:
    """What a served run is made of before its folder is known."""

    def __init__(self, study: Study, base: Base, lora: LoRAModel, progress: Progress, open_link: OpenLink) -> None:
        settings = study.settings
        self._study, self._base, self._progress, self._open_link = study, base, progress, open_link
        self.tokenizer_sha256 = fingerprint(base.tokenizer)
        ranks, scales = dict(enumerate(settings.client_ranks)), dict(enumerate(settings.client_scales))
        self._rows = dict.fromkeys(ranks, 0)  # told by each site as it becomes ready
        names = study.sites.names
        self.population = Population(len(names), study.cohort_size, ranks, scales, _no_rows, names, self._rows)
        self._lora = lora
        self._cut = CutStudy(study, lora, self._rows) if settings.traits.is_cut else None
        if settings.privacy.unit == "client":
            check_accountant()
        plan = None if self._cut is not None else _plan_of(study, self.population, lora)
        self._plan = None if plan is None else within_budget(settings, plan, progress)

    @property
    def num_rounds(self) -> int:
        """Rounds in all."""
        found = self._cut or self._plan
        assert found is not None
        return found.num_rounds

    @contextmanager
    def started(self, folder: RunFolder) -> Iterator[SitesKind | CutKind]:
        """Open the link for a run folder, yield its loop, and close the link at the end."""
        study, settings = self._study, self._study.settings
        run, scores = str(folder.manifest["identity"]["run_id"]), study.sites.evaluate == "sites"
        hashes = (self._base.revision_hash, self.tokenizer_sha256)
        cuts = [None if self._cut is None else self._cut.client_cut(client) for client in self._rows]
        size = study.cohort_size
        sheets = [sheet_of(settings, client, run, *hashes, scores, cut, size) for client, cut in enumerate(cuts)]
        link = self._open_link(study, self._largest_frame())
        try:
            attendance: dict[str, Any] = {
                "link": link,
                "names": study.sites.names,
                "members": study.members,
                "sheets": sheets,
                "wire": WireDtype(settings.wire.dtype),
                "patience": Patience(study.quorum, study.sites.deadline_s, study.sites.grace_s),
                "note": self._progress.note,
                "rows": self._rows,
                "versions": f"fedloom {version('fedloom')}, torch {version('torch')}",
            }
            yield self._kind(attendance)
        finally:
            link.close()

    def _kind(self, attendance: dict[str, Any]) -> SitesKind | CutKind:
        common = (self._study.settings, None, self._base, self._lora, self.population)
        if self._cut is not None:
            engine = Attendance(**attendance)
            run, clients = self._cut.run_over(engine)
            return CutKind(*common, None, run, engine, clients)
        assert self._plan is not None
        plan, state = self._plan, self._plan.strategy.initial()
        rounds = SitesEngine(**attendance, lora=self._lora, plan=plan, state=state)
        if plan.masking is not None:
            names = self._study.sites.names
            verify = verifier_of(read_kit(self._study.sites.kit, "server").root, names)
            masking = replace(plan.masking, run=named(rounds.run, names), ask=rounds.sum_of, verify=verify)
            plan = rounds.plan = replace(plan, masking=masking)
        return SitesKind(*common, plan, None, rounds)

    def _largest_frame(self) -> int:
        if self._cut is not None:
            return MAX_HEAD_BYTES + self._cut.largest_body()
        shapes, rank = self._lora.shapes, max(self.population.ranks.values())
        numbers = sum(rank * (num_out + num_in) for num_out, num_in in shapes.values())
        largest = largest_message(2 * len(shapes), 4 * numbers)
        if self._plan is not None and isinstance(summed := self._plan.strategy, MaskedSums):
            largest = max(largest, largest_sum_message(self.population.clients_per_round, summed.num_numbers))
        return MAX_HEAD_BYTES + largest


@dataclass(frozen=True, eq=False)
class SitesKind(LoopKind):
    """A loop whose clients are sites."""

    engine: SitesEngine

    @property
    def draws(self) -> Drawn:
        """Where the server's noise comes from: its operating system."""
        return SYSTEM

    def resume(self, folder: RunFolder, write_adapter: WriteAdapter, progress: Progress) -> Loop:
        """Wait for the quorum, and return the loop at the point that the folder has reached."""
        loop, engine = super().resume(folder, write_adapter, progress), self.engine
        assert isinstance(loop, AdapterRounds)
        engine.state = loop.state
        engine.counted |= {
            client["client"]: record["round"]
            for record in folder.records()
            for client in record["clients"]
            if client["reason"] is None
        }
        if loop.state.round < loop.num_rounds:
            engine.wait_for(engine.patience.quorum, engine.patience.deadline_s)
        write_holdings(folder, self.population)
        return SitesRounds(
            self, loop.plan, loop.state, loop.memories, loop.path, loop.write_adapter, progress, folder, engine
        )


@dataclass(frozen=True, eq=False)
class SitesRounds(AdapterRounds):
    """Rounds whose clients are sites."""

    folder: RunFolder
    sites: SitesEngine

    @contextmanager
    def _started(self) -> Iterator[SitesEngine]:
        yield self.sites

    def engine(self) -> AbstractContextManager[SitesEngine]:
        """Return the engine; its link is opened and closed around the whole run."""
        return self._started()

    def metrics(self, record: RoundRecord) -> dict[str, Any]:
        """Return the round's record with a part per site, show it, and let the engine know what counted."""
        metrics = super().metrics(record)
        self.sites.state = record.state
        self.sites.counted |= {client.client: record.round for client in record.clients if client.reason is None}
        for client in record.clients:
            if client.reason is not None:
                self.sites.sites[self.sites.names[client.client]].left_out = client.reason
        self.sites.catch_up()
        metrics["sites"] = self.sites.report()
        if (privacy := self.kind.settings.privacy).unit == "row":
            told = {client: self.sites.sites[name].epsilon for client, name in enumerate(self.sites.names)}
            for one in metrics["clients"]:
                one["epsilon"] = told[one["client"]]
            column = self.kind.settings.data.unit_column
            metrics["privacy"] = privacy_record([*told.values()], privacy.delta, SYSTEM, column)
        for line in self.sites.lines():
            self.progress.note(f"  {line}")
        write_holdings(self.folder, self.kind.population)
        return metrics


@dataclass
class SitesSession(Session):
    """A session that may evaluate at the sites."""

    scores_at_sites: bool = False
    engine: Attendance = field(init=False)

    def evaluate(self, state: Standing, score: Score) -> dict[str, Any]:
        """Score a state on the server's held-out rows, or on the sites'."""
        if not self.scores_at_sites:
            return super().evaluate(state, score)
        return scored_by_sites(self.engine, state.round, state.shared)


def _held_out(study: Study, workshop: Workshop, base: Base) -> _HeldOut:
    found = workshop.held_out(study.written, base)
    if found is None:
        return _HeldOut(None, None, None)
    rows, encoded = found
    return _HeldOut(rows, encoded.tokens, encoded.tokens.sha256())


def _run_id(out: Path, fresh: bool) -> str:
    """Return the id of the run in ``out``, or a new one where no round of it is complete: that run begins anew.

    Sites keep by it what they remember. It is drawn, so that two runs of one study are two at the sites.
    """
    known = {} if fresh or not is_begun(out) else read_manifest(out)["identity"]
    return str(known.get("run_id") or secrets.token_hex(16))


def _plan_of(study: Study, population: Population, lora: LoRAModel) -> RoundPlan:
    """Return the plan of the rounds, whose clients are drawn from the sites that have not withdrawn."""
    sites, settings = study.sites, study.settings
    present = [client for client, name in enumerate(sites.names) if name not in sites.withdrawn]
    sample = cohorts(settings, study.cohort_size, present, population.num_rows)
    return replace(plan_of(settings, population, lora, SYSTEM), sample=sample)


def _no_rows(client: int) -> TokenSet:
    raise RunError(f"expected the rows of client {client} at its site, asked for them at the server; ask the site")
