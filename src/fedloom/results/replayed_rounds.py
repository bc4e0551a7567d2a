"""What clients read and sent in the rounds of a run, made again from its folder: its seed decides both.

A round is run again from the state before it: the first from what every run of these settings begins with, any other
where the state of the round before is kept. Uploads that the run kept take the place of those made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedloom.assembly.clients_at_once import clients_at_once_here
from fedloom.assembly.inputs import Inputs
from fedloom.assembly.round_plan import Population, plan_of, population_of, training_of
from fedloom.assembly.round_state import read_round
from fedloom.clients.memory import Memory
from fedloom.config import Settings
from fedloom.config.client_names import resolve_names, without_clients
from fedloom.data.canaries import CANARIES
from fedloom.data.tokens import TokenSet
from fedloom.engines.local_engine import LocalEngine
from fedloom.errors import EvaluationError
from fedloom.federation.blob import WireDtype
from fedloom.federation.rounds import RoundPlan
from fedloom.federation.server import broadcasts_for
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Payload
from fedloom.methods.state import ServerState, Update
from fedloom.methods.state_codec import TENSORS, damage_named
from fedloom.results.held_out import own_inputs
from fedloom.results.opened_result import OpenedResult
from fedloom.run_folder.contents import read_object
from fedloom.run_folder.durable import plain
from fedloom.training.read_rows import rows_read


@dataclass(frozen=True, eq=False)
class SentUpdate:
    """What the server sees of one client in a round.

    Attributes:
        start: what the client trained from.
        seen: what the server decodes of its answer: the adapter that it ended with, or a gradient.
        is_gradient: which of the two.
        read: the rows that the client read in the round.
    """

    client: int
    start: Adapter
    seen: Adapter
    is_gradient: bool
    read: TokenSet


@dataclass(frozen=True, eq=False)
class Replay:
    """A run's clients and plan, and what its records say of who took part."""

    opened: OpenedResult
    inputs: Inputs
    settings: Settings
    population: Population

    @classmethod
    def of(cls, opened: OpenedResult) -> Replay:
        """Set a run's clients up as they were.

        Raises:
            EvaluationError: the folder holds no rounds that can be made again.
        """
        run, settings = opened.found.run, opened.settings
        if run is None or settings is None:
            raise EvaluationError(f"{opened.found.path}: expected a run, got a PEFT adapter; give a run folder")
        if not settings.traits.runs_rounds or not (run.path / "partition.json").exists():
            raise EvaluationError(
                f"{run.path}: expected a run of rounds whose rows are here, got one of {settings.method.name}; give "
                "the folder of such a run"
            )
        if settings.model.adapter is not None:
            raise EvaluationError(
                f"{run.path}: expected a run that starts from its base alone, got one with model.adapter; measure "
                "a run without it"
            )
        inputs = own_inputs(opened)
        assert inputs is not None
        if inputs.canaries:
            kept = read_object(run.path, run.manifest, CANARIES).get("canaries")
            if kept != plain([asdict(canary) for canary in inputs.canaries]):
                raise EvaluationError(
                    f"{run.path / CANARIES}: expected the canaries that the settings plant, got others; measure with "
                    "the tokenizer and the version of fedloom that the run was made with"
                )
        names = inputs.partition.names
        placed = resolve_names(without_clients(settings, names, inputs.left_out), names)
        return cls(opened, inputs, placed, population_of(placed, inputs))

    @cached_property
    def plan(self) -> RoundPlan:
        """What stays the same from round to round."""
        return plan_of(self.settings, self.population, self.opened.lora)

    @property
    def num_rounds(self) -> int:
        """Rounds that the run has completed."""
        assert self.opened.found.run is not None
        return len(self.opened.found.run.records)

    def took_part(self, round: int) -> list[int]:
        """Return the clients whose updates a round used."""
        assert self.opened.found.run is not None
        record = self.opened.found.run.records[round - 1]
        return sorted(one["client"] for one in record["clients"] if one.get("reason") is None)

    def read_in(self, round: int, client: int) -> NDArray[np.int64]:
        """Return the positions, among a client's rows, of those that it read in a round."""
        if round <= self.settings.start_rounds:
            return np.zeros(0, np.int64)
        return self.rows_read(self.population.rows_of(client), round, client)

    def rows_read(self, rows: TokenSet, round: int, client: int) -> NDArray[np.int64]:
        """Return the positions of those that a client would read of ``rows``."""
        training, seed = training_of(self.settings), self.settings.run.seed
        return rows_read(rows, training, seed=seed, round=round, client=client)

    def num_own_rows(self, client: int) -> int:
        """Return how many of a client's rows are no canaries; they come first."""
        if self.settings.traits.pools_rows:
            return len(self.inputs.rows)
        return int(self.inputs.dealt.sizes[client])

    def read(self) -> dict[int, NDArray[np.int64]]:
        """Return, of every client that took part, the positions of all rows that it read."""
        found: dict[int, list[NDArray[np.int64]]] = {}
        for round in range(1, self.num_rounds + 1):
            for client in self.took_part(round):
                found.setdefault(client, []).append(self.read_in(round, client))
        return {client: np.unique(np.concatenate(parts)) for client, parts in sorted(found.items())}

    def last_round(self) -> int:
        """Return the last round that can be run again."""
        for round in range(self.num_rounds, self.settings.start_rounds + 1, -1):
            if self._is_kept(round - 1):
                return round
        return self.settings.start_rounds + 1

    def sent(
        self,
        round: int,
        clients: Sequence[int] | None = None,
        rows_of: Callable[[int], TokenSet] | None = None,
    ) -> Iterator[SentUpdate]:
        """Run a round again, and yield what the server saw of each client, or of those named.

        With other rows (``rows_of``) it is what clients would have sent that keep nothing from before: what an attacker
        can find out with text of its own.

        Raises:
            EvaluationError: the run has no such round, or the state before it is not kept.
        """
        state, memories = self._before(round)
        plan, lora, settings = self.plan, self.opened.lora, self.settings
        asked, wire = self.took_part(round) if clients is None else clients, plan.rules.wire
        owned = rows_of or self.population.rows_of
        if rows_of is not None:
            memories = {client: Memory(one.version, start=one.start) for client, one in memories.items()}
        work = plan.strategy.client.work(round)
        is_gradient = work.payload in (Payload.GRADIENT, Payload.SKETCH)
        broadcasts = broadcasts_for(state, asked, plan.strategy, plan.ranks, plan.scales, wire)
        engine = LocalEngine(
            lora=lora,
            rows_of=owned,
            training=training_of(settings),
            seed=settings.run.seed,
            half=plan.strategy.client,
            wire=WireDtype(settings.wire.dtype),
            clients_at_once=clients_at_once_here(settings, lora)[0],
            memories=memories,
            version=state.round,
            side=state.side,
        )
        of = {one.client: one for one in broadcasts}
        for arrival in engine.train(broadcasts):
            if not isinstance(arrival.outcome, Update):
                continue
            client, trained = arrival.outcome.client, of[arrival.outcome.client].trained
            if isinstance(trained, Draw):
                trained = trained.adapter(plan.shapes, plan.ranks[client], settings.run.seed)
            rows = owned(client)
            read = rows.select(self.rows_read(rows, round, client))
            yield SentUpdate(client, trained, arrival.outcome.adapter, is_gradient, read)

    def _is_kept(self, round: int) -> bool:
        run = self.opened.found.run
        assert run is not None
        return (run.round_files(round).folder / TENSORS).exists()

    def _before(self, round: int) -> tuple[ServerState, dict[int, Memory]]:
        run, first = self.opened.found.run, self.settings.start_rounds + 1
        assert run is not None
        if not first <= round <= self.num_rounds:
            raise EvaluationError(
                f"--round: expected {first} to {self.num_rounds}, the rounds of {run.path}, got {round}; choose one"
            )
        if round == 1:
            return self.plan.strategy.initial(), {}
        if not self._is_kept(round - 1):
            raise EvaluationError(
                f"--round {round}: expected the state before it in {run.path}, found none; choose another round, or "
                'train with run.keep_states = "all"'
            )
        files = run.round_files(round - 1)
        with damage_named(files.folder):
            return read_round(files)
