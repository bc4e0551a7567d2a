"""The local engine: every client in this process, one after another or in cohorts, over one resident base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.clients.client import Assignment, Client
from fedloom.clients.held_sides import HeldSides
from fedloom.clients.memory import Memory
from fedloom.clients.shared_base import SharedBase
from fedloom.data.tokens import TokenSet
from fedloom.engines.receiving import arrival_of
from fedloom.errors import FedloomError
from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import as_sent, encode_broadcast
from fedloom.federation.intake import Arrival
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import ClientHalf, EveryRound
from fedloom.methods.state import Broadcast
from fedloom.training.cohort_round import ClientResult, LocalTraining, StepReport
from fedloom.training.row_losses import RowLosses, row_losses_of


@dataclass
class LocalEngine:
    """Train clients over one base in this process, through real messages.

    Attributes:
        rows_of: a client's rows.
        training: how each client trains.
        half: what each client trains, sends and keeps.
        wire: dtype of the messages; None where nothing crosses (centralised and standalone).
        clients_at_once: clients whose adapters are open at once; results do not depend on it beyond rounding.
        memories: what clients keep from before, where a run resumes.
        version, side: the side that every client starts with, where a run resumes: that of the last completed round.
    """

    lora: LoRAModel
    rows_of: Callable[[int], TokenSet]
    training: LocalTraining
    seed: int
    half: ClientHalf = field(default_factory=EveryRound)
    wire: WireDtype | None = WireDtype.FP32
    clients_at_once: int = 1
    memories: dict[int, Memory] = field(default_factory=dict)
    version: int = 0
    side: Adapter = field(default_factory=Adapter)
    on_step: Callable[[StepReport], None] | None = None

    def __post_init__(self) -> None:
        sides = HeldSides(self.version, self.side)
        self._base = SharedBase(self.lora, self.rows_of, self.training, self.seed, self.half, sides, self.on_step)

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Train the clients, ``clients_at_once`` at a time, in the order given."""
        self._base.forget_side()
        for first in range(0, len(broadcasts), self.clients_at_once):
            ready: list[_Ready] = []
            for broadcast in broadcasts[first : first + self.clients_at_once]:
                prepared = self._prepared(broadcast)
                if isinstance(prepared, Arrival):
                    yield prepared
                else:
                    ready.append(prepared)
            results = self._base.train([one.assignment for one in ready])
            for one, result in zip(ready, results, strict=True):
                yield self._arrival(one, result)

    def held(self) -> Mapping[int, Memory]:
        """Return what clients keep, for a checkpoint."""
        return self.memories

    def row_losses(self, adapter: Adapter, rows: TokenSet, token_budget: int) -> RowLosses:
        """Return the loss of every row under the base with an adapter."""
        return row_losses_of(self.lora, adapter, rows, token_budget=token_budget, cores=self.training.cores)

    def _prepared(self, broadcast: Broadcast) -> _Ready | Arrival:
        """Let a client read its broadcast; what it cannot read is its failure."""
        number = broadcast.client
        client = self._base.client(number, self.memories.get(number) or Memory(version=self.version))
        blob = b"" if self.wire is None else encode_broadcast(broadcast, self.wire)
        try:
            assignment = client.prepare(as_sent(broadcast)) if self.wire is None else client.receive(blob)
        except FedloomError as error:
            return Arrival(client.failure(error), len(blob), 0)
        self.memories[number] = client.memory
        return _Ready(client, broadcast, assignment, len(blob))

    def _arrival(self, one: _Ready, result: ClientResult | FedloomError) -> Arrival:
        if isinstance(result, FedloomError):
            return Arrival(one.client.failure(result), one.num_bytes, 0)
        if self.wire is None:
            outcome, _ = one.client.conclude(one.assignment, result, WireDtype.FP32)
            arrival = Arrival(outcome, one.num_bytes, 0)
        else:
            blob = one.client.answer(one.assignment, result, self.wire)
            arrival = arrival_of(
                blob,
                one.broadcast,
                one.num_bytes,
                work=one.assignment.work,
                shapes=self.lora.shapes,
                wire=self.wire,
                seed=self.seed,
            )
        self.memories[one.client.number] = one.client.memory
        return arrival


@dataclass(frozen=True, eq=False)
class _Ready:
    """A client that has read its broadcast and can train."""

    client: Client
    broadcast: Broadcast
    assignment: Assignment
    num_bytes: int
