"""The local engine: every client in this process, one after another or in cohorts, over one resident base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.clients.client import Assignment, Client
from fedloom.clients.held_sides import HeldSides
from fedloom.clients.memory import Memory
from fedloom.data.tokens import TokenSet
from fedloom.errors import FedloomError
from fedloom.federation.blob import WireDtype
from fedloom.federation.intake import Arrival
from fedloom.federation.messages import as_sent, decode_answer, encode_broadcast
from fedloom.lora.initial import Draw
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import ClientHalf, EveryRound
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.training.cohort_round import ClientResult, LocalTraining, StepReport, train_cohort


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
        self._sides = HeldSides(self.version, self.side)

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Train the clients, ``clients_at_once`` at a time, in the order given."""
        beside: Adapter | None = None
        for first in range(0, len(broadcasts), self.clients_at_once):
            ready: list[_Ready] = []
            for broadcast in broadcasts[first : first + self.clients_at_once]:
                prepared = self._prepared(broadcast)
                if isinstance(prepared, Arrival):
                    yield prepared
                else:
                    ready.append(prepared)
            if ready and ready[0].assignment.side is not beside:
                beside = ready[0].assignment.side
                self.lora.set_side(beside)
            yield from self._train_cohort(ready)

    def held(self) -> Mapping[int, Memory]:
        """Return what clients keep, for a checkpoint."""
        return self.memories

    def _prepared(self, broadcast: Broadcast) -> _Ready | Arrival:
        """Let a client read its broadcast; what it cannot read is its failure."""
        number = broadcast.client
        memory = self.memories.get(number) or Memory(version=self.version)
        client = Client(
            number, self.half, self.lora.shapes, self.seed, lambda: self.rows_of(number), self._sides, memory
        )
        blob = b"" if self.wire is None else encode_broadcast(broadcast, self.wire)
        try:
            assignment = client.prepare(as_sent(broadcast)) if self.wire is None else client.receive(blob)
        except FedloomError as error:
            return Arrival(client.failure(error), len(blob), 0)
        self.memories[number] = client.memory
        return _Ready(client, broadcast, assignment, len(blob))

    def _train_cohort(self, cohort: Sequence[_Ready]) -> Iterator[Arrival]:
        if not cohort:
            return
        tasks, round = [one.assignment.task for one in cohort], cohort[0].broadcast.round
        try:
            results = train_cohort(self.lora, tasks, self.training, seed=self.seed, round=round, on_step=self.on_step)
        except FedloomError as error:
            if len(cohort) > 1:
                for one in cohort:
                    yield from self._train_cohort([one])
            else:
                yield Arrival(cohort[0].client.failure(error), cohort[0].num_bytes, 0)
            return
        for one, result in zip(cohort, results, strict=True):
            yield self._arrival(one, result)

    def _arrival(self, one: _Ready, result: ClientResult) -> Arrival:
        outcome: Update | Failure
        if self.wire is None:
            (outcome, _), size = one.client.conclude(one.assignment, result, WireDtype.FP32), 0
        else:
            blob = one.client.answer(one.assignment, result, self.wire)
            shapes, rank = self.lora.shapes, one.broadcast.rank

            def drawn(draw: Draw) -> Adapter:
                return draw.adapter(shapes, rank, self.seed)

            outcome = decode_answer(blob, one.broadcast, one.assignment.work, shapes, self.wire, drawn)
            size = len(blob)
        self.memories[one.client.number] = one.client.memory
        return Arrival(outcome, one.num_bytes, size)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A client that has read its broadcast and can train."""

    client: Client
    broadcast: Broadcast
    assignment: Assignment
    num_bytes: int
