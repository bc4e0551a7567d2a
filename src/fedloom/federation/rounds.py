"""The round loop, to be read beside Algorithm 1 of FedIT or FLoRA.

It knows no method by name, no file and no device: a strategy says what is sent and what becomes of what returns, an
engine says where clients live, and what is worth keeping is handed out as frozen records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedloom.errors import TooFewClientsError, UpdateError
from fedloom.federation.messages import as_received
from fedloom.federation.server import ServerRules, aggregation_noise, broadcasts_for, next_state
from fedloom.federation.validation import check_update
from fedloom.lora.algebra import norm
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, Failure, ServerState, Update
from fedloom.methods.strategy import Strategy


@dataclass(frozen=True, eq=False)
class Arrival:
    """What came back from one client, and the bytes of the two messages."""

    outcome: Update | Failure
    download_bytes: int
    upload_bytes: int


class Engine(Protocol):
    """Where clients live: takes a round's broadcasts, yields what comes back, in any order."""

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Train the clients that the broadcasts are for."""
        ...


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round; ``reason`` says why an update was left out, and is None where it was used."""

    client: int
    reason: str | None
    download_bytes: int
    upload_bytes: int
    num_rows: int = 0
    num_parameters: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_steps: int = 0
    loss_nats: float | None = None
    loss_last_nats: float | None = None
    norm: float | None = None
    weight: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """All there is to know of a round that has ended; ``applied`` is the aggregate, as the wire lets clients see it."""

    round: int
    state: ServerState
    clients: tuple[ClientRecord, ...]
    applied: Adapter
    aggregation_noise: float | None
    change_norm: float
    seconds: Mapping[str, float]
    evaluation: Mapping[str, Any] | None


@dataclass(frozen=True)
class RoundPlan:
    """What stays the same from round to round.

    Attributes:
        sample: the clients of a round, by its number.
        shapes: (out, in) of every target module.
        ranks, scales: of every client.
        min_clients: usable updates without which the run ends.
        max_norm_ratio: a change this many times the last round's median norm is refused.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
    """

    num_rounds: int
    strategy: Strategy
    rules: ServerRules
    sample: Callable[[int], list[int]]
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[int, int]
    scales: Mapping[int, float]
    min_clients: int = 1
    max_norm_ratio: float = 100.0
    evaluate_every: int = 1

    def is_evaluated(self, round: int) -> bool:
        """Tell whether the model is evaluated after a round."""
        return round == self.num_rounds or (self.evaluate_every > 0 and round % self.evaluate_every == 0)


def run_rounds(
    state: ServerState,
    plan: RoundPlan,
    engine: Engine,
    evaluate: Callable[[ServerState], Mapping[str, Any]],
    keep: Callable[[Update], None] = lambda update: None,
) -> Iterator[RoundRecord]:
    """Yield one record a round, from the state given to the last round.

    ``evaluate`` scores a state; ``keep`` is shown every update that is used. What is fresh each round and what
    persists is in the state alone, so a loop started from a saved state goes on as if never stopped.

    Raises:
        TooFewClientsError: if a round has fewer usable updates than ``plan.min_clients``; the state before it stands.
    """
    while state.round < plan.num_rounds:
        clock = Clock()
        clients = plan.sample(state.round + 1)
        broadcasts = broadcasts_for(state, clients, plan.strategy, plan.ranks, plan.scales)
        intake = Intake(plan, state, broadcasts)
        aggregate = plan.strategy.aggregate(state, intake.usable(clock.timed("train", engine.train(broadcasts)), keep))
        applied = as_received(aggregate.applied, plan.rules.wire)
        noise = aggregation_noise(applied, aggregate.ideal)
        change = aggregate.change(state.start)
        state = next_state(state, aggregate, plan.rules, intake.norms, clients)
        clock.lap("aggregate")
        evaluation = evaluate(state) if plan.is_evaluated(state.round) else None
        clock.lap("evaluate")
        records = intake.records(aggregate.weights)
        yield RoundRecord(
            round=state.round,
            state=state,
            clients=records,
            applied=applied,
            aggregation_noise=noise,
            change_norm=norm(change),
            seconds=clock.seconds,
            evaluation=evaluation,
        )


@dataclass
class Intake:
    """A round's arrivals: passes on usable updates one at a time and remembers why others were left out."""

    plan: RoundPlan
    state: ServerState
    broadcasts: Sequence[Broadcast]
    seen: dict[int, ClientRecord] = field(default_factory=dict)

    @property
    def norms(self) -> list[float]:
        """Norms of the changes that were used."""
        return [record.norm for record in self.seen.values() if record.reason is None and record.norm is not None]

    def usable(self, arrivals: Iterable[Arrival], keep: Callable[[Update], None]) -> Iterator[Update]:
        """Yield the updates that pass validation."""
        expected = {broadcast.client: broadcast for broadcast in self.broadcasts}
        for arrival in arrivals:
            client = arrival.outcome.client
            if client not in expected or client in self.seen:
                continue
            record = self._examine(arrival, expected[client])
            self.seen[client] = record
            if record.reason is None and isinstance(arrival.outcome, Update):
                keep(arrival.outcome)
                yield arrival.outcome
        for client in expected.keys() - self.seen.keys():
            self.seen[client] = ClientRecord(client, "returned nothing", 0, 0)
        self._require_enough()

    def records(self, weights: Mapping[int, float]) -> tuple[ClientRecord, ...]:
        """Return one record per client in the order of the ids, with the weights the strategy gave."""
        return tuple(replace(self.seen[client], weight=weights.get(client, 0.0)) for client in sorted(self.seen))

    def _examine(self, arrival: Arrival, broadcast: Broadcast) -> ClientRecord:
        outcome = arrival.outcome
        crossed = (arrival.download_bytes, arrival.upload_bytes)
        if isinstance(outcome, Failure):
            return ClientRecord(outcome.client, outcome.reason, *crossed)
        typical = self.state.typical_norm
        reason, change = None, None
        try:
            limit = None if typical is None else self.plan.max_norm_ratio * typical
            change = check_update(outcome, broadcast, self.plan.shapes, limit)
        except UpdateError as error:
            reason = str(error)
        return ClientRecord(
            outcome.client,
            reason,
            *crossed,
            num_rows=outcome.num_rows,
            num_parameters=outcome.adapter.num_parameters,
            num_tokens=outcome.num_tokens,
            num_loss_tokens=outcome.num_loss_tokens,
            num_steps=outcome.num_steps,
            loss_nats=outcome.loss_nats,
            loss_last_nats=outcome.loss_last_nats,
            norm=change,
            seconds=outcome.seconds,
        )

    def _require_enough(self) -> None:
        used = len(self.norms)
        if used >= self.plan.min_clients:
            return
        reasons = "; ".join(f"client {r.client}: {r.reason}" for r in self.seen.values() if r.reason is not None)
        raise TooFewClientsError(
            f"round {self.state.round + 1}: expected usable updates from at least {self.plan.min_clients} clients "
            f"(federation.min_clients), got {used} ({reasons}); {advice_after(self.state.round)}"
        )


def advice_after(num_rounds_done: int) -> str:
    """Say how to go on where a round fails after ``num_rounds_done`` others."""
    if num_rounds_done == 0:
        return "mend the cause and run again"
    return (
        "earlier rounds are saved: where the cause has passed, run again to go on; other settings need another folder "
        "or a fresh start"
    )


class Clock:
    """Seconds by phase of one round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def timed(self, phase: str, arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
        """Book the time spent inside the engine under ``phase``, what lies between under ``aggregate``."""
        for arrival in arrivals:
            self.lap(phase)
            yield arrival
            self.lap("aggregate")
        self.lap(phase)
