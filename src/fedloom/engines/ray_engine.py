"""The engine for a cluster: clients train on Ray's workers, and the result is the one of this process.

The driver keeps what clients remember and hands it out with each message, so that a client trains on whichever worker
is free, and a checkpoint has it. The side of a round lies once on every machine. Arrivals come in the order of the
broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fedloom.clients.held_sides import HeldSides
from fedloom.clients.memory import Memory
from fedloom.data.tokens import TokenSet
from fedloom.engines.crew import Crew, Lost
from fedloom.engines.ray_worker import Letter, Unsuitable, as_arrays, letter, opened
from fedloom.engines.receiving import arrival_of
from fedloom.errors import BehindError, ModelError
from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import encode_broadcast
from fedloom.federation.intake import Arrival
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import ClientHalf
from fedloom.methods.state import Broadcast, Failure
from fedloom.training.row_losses import PassLosses, RowLosses, joined, passes_of

Put = Callable[[Any], Any]
"""Store a value once on every machine that asks for it, and return a reference to it."""
_SHARES = 4
"""Parts of an evaluation per worker, so that one that is slower does less."""


@dataclass
class RayEngine:
    """Train clients on a crew of workers.

    Attributes:
        put: stores what all workers read.
        score_here: scores a pass in this process, where no worker could.
        clients_at_once: clients that train together, the same ones as in one process.
        memories: what clients keep from before, where a run resumes.
        version, side: the side that every client starts with, where a run resumes.
        passes_of: says which rows are scored together.
    """

    crew: Crew[Any]
    put: Put
    score_here: Callable[[Adapter, TokenSet, Sequence[int]], PassLosses]
    half: ClientHalf
    shapes: Mapping[str, tuple[int, int]]
    seed: int
    wire: WireDtype
    clients_at_once: int = 1
    memories: dict[int, Memory] = field(default_factory=dict)
    version: int = 0
    side: Adapter = field(default_factory=Adapter)
    passes_of: Callable[[TokenSet, int], list[list[int]]] = passes_of

    def __post_init__(self) -> None:
        self._sides = HeldSides(self.version, self.side)
        self._rows: tuple[TokenSet | None, list[Any]] = (None, [])
        self._evaluations = 0

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Deal the clients out, ``clients_at_once`` together, and yield what they answer in the order given.

        Clients whose group no worker answered are asked once more one by one: one of them may be the reason.

        Raises:
            ModelError: the base cannot be trained, which is no client's failure.
        """
        if not broadcasts:
            return
        side, step = self._side_of(broadcasts), self.clients_at_once
        again: list[Broadcast] = []
        groups = [broadcasts[first : first + step] for first in range(0, len(broadcasts), step)]
        for task, answer in self.crew.deal([self._task(side, group) for group in groups]):
            if isinstance(answer, Lost) and len(task.broadcasts) > 1:
                again += task.broadcasts
            else:
                yield from self._arrivals(task, answer)
        for task, answer in self.crew.deal([self._task(side, [one]) for one in again]):
            yield from self._arrivals(task, answer)

    def held(self) -> Mapping[int, Memory]:
        """Return what clients keep, for a checkpoint."""
        return self.memories

    def row_losses(self, adapter: Adapter, rows: TokenSet, token_budget: int) -> RowLosses:
        """Deal the passes out; what no worker scores, this process does."""
        if self._rows[0] is not rows:
            self._rows = (rows, [self.put(one) for one in (rows.input_ids, rows.supervised, rows.starts)])
        self._evaluations += 1
        reference, passes = self.put(as_arrays(adapter)), self.passes_of(rows, token_budget)
        size = max(1, -(-len(passes) // (_SHARES * self.crew.size)))
        shares = [passes[first : first + size] for first in range(0, len(passes), size)]
        name = f"evaluation {self._evaluations}"
        tasks = [_Scoring(name, reference, self._rows[1], share) for share in shares]
        scores: list[PassLosses] = []
        for task, answer in self.crew.deal(tasks):
            if isinstance(answer, Lost):
                scores += [self.score_here(adapter, rows, members) for members in task.passes]
            else:
                scores += answer
        return joined(len(rows), passes, scores)

    def _memory(self, client: int) -> Memory:
        return self.memories.get(client) or Memory(version=self.version)

    def _side_of(self, broadcasts: Sequence[Broadcast]) -> list[Any]:
        """Return a reference to the side that a round's clients come to hold; none where no news lead there.

        Then clients say themselves that they are behind, as they do in one process.
        """
        for one in broadcasts:
            with suppress(BehindError):
                return [self.put(as_arrays(self._sides.caught_up(self._memory(one.client).version, one.news)))]
        return []

    def _task(self, side: Sequence[Any], group: Sequence[Broadcast]) -> _Training:
        return _Training(side, group, self._memory, self.wire)

    def _arrivals(self, task: _Training, answer: list[Letter] | Unsuitable | Lost) -> Iterator[Arrival]:
        if isinstance(answer, Unsuitable):
            raise ModelError(answer.reason)
        if isinstance(answer, Lost):
            for one in task.broadcasts:
                yield Arrival(Failure(one.client, answer.reason), task.download_bytes[one.client], 0)
            return
        for one, found in zip(task.broadcasts, answer, strict=True):
            self.memories[one.client] = opened(found)
            yield arrival_of(
                found.message.data,
                one,
                task.download_bytes[one.client],
                work=self.half.work(one.round),
                shapes=self.shapes,
                wire=self.wire,
                seed=self.seed,
            )


@dataclass
class _Training:
    """A group's part of a round; encoded when it is handed out, and not before."""

    side: Sequence[Any]
    broadcasts: Sequence[Broadcast]
    memory_of: Callable[[int], Memory]
    wire: WireDtype
    download_bytes: dict[int, int] = field(default_factory=dict)
    method: str = "train"

    def arguments(self) -> tuple[int, Sequence[Any], list[Letter]]:
        """Return the version of the side, where the side is, and the messages with the clients' memories."""
        letters = []
        for one in self.broadcasts:
            blob = encode_broadcast(one, self.wire)
            self.download_bytes[one.client] = len(blob)
            letters.append(letter(one.client, blob, self.memory_of(one.client)))
        return self.broadcasts[0].news.version, self.side, letters


@dataclass
class _Scoring:
    """Some passes of an evaluation."""

    name: str
    adapter: Any
    rows: Sequence[Any]
    passes: Sequence[Sequence[int]]
    method: str = "score"

    def arguments(self) -> tuple[str, list[Any], Sequence[Any], Sequence[Sequence[int]]]:
        """Return which evaluation it is, where adapter and rows are, and the passes."""
        return self.name, [self.adapter], self.rows, self.passes
