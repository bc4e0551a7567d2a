"""The round loop, to be read beside Algorithm 1 of FedIT or FLoRA.

It knows no method by name, no file and no device: a strategy says what is sent and what becomes of what returns, an
engine says where clients live, and what is worth keeping is handed out as frozen records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedloom.federation.agreement import Agreements
from fedloom.federation.intake import Arrival, ClientRecord, Intake
from fedloom.federation.masked_round import Masking, masked_round
from fedloom.federation.module_figures import RoundFigures, round_figures
from fedloom.federation.robust import RobustRule
from fedloom.federation.server import (
    ServerRules,
    as_applied,
    broadcasts_for,
    next_state,
    views_after,
)
from fedloom.federation.update_checks import Asked
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Payload, Work
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.state import Broadcast, ServerState, Update
from fedloom.methods.strategy import Strategy


class Engine(Protocol):
    """Where clients live: takes a round's broadcasts, yields what comes back, in any order.

    Whoever makes an engine does it as a context manager (``assembly.engine_choice.engine_of``): it is started before
    the first round and stopped after the last, also where an error or a person ends them, and then holds no process,
    no connection and no file. The round loop only calls :meth:`train`.
    """

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Train the clients that the broadcasts are for, and yield one arrival each.

        A client that fails, that is lost or that refuses arrives as a ``Failure`` with its reason: nothing that one
        client or machine does is raised here. A client that does not arrive counts as one that returned nothing. An
        arrival is yielded as soon as it can be, since the server works on it while others train.
        """
        ...


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """All there is to know of a round that has ended; ``applied`` is the aggregate, as the wire lets clients see it."""

    round: int
    state: ServerState
    clients: tuple[ClientRecord, ...]
    applied: Adapter
    figures: RoundFigures
    seconds: Mapping[str, float]
    evaluation: Mapping[str, Any] | None


@dataclass(frozen=True)
class RoundPlan:
    """What stays the same from round to round.

    Attributes:
        sample: the clients of a round, by its number.
        shapes: (out, in) of every target module.
        ranks, scales: of every client.
        asked: what is known of a client's part before a round, by which its own counts are judged.
        asked_to_sketch: likewise, of a round that sketches the first gradient; None: the same.
        start_rounds: the first rounds, in which nothing is trained.
        min_clients: usable updates without which the run ends.
        max_norm_ratio: a change this many times the median norm is rejected.
        max_weight: largest share of one client.
        robust: the rule by which few hostile updates cannot decide.
        masking: how the clients' sum is masked, so that no update is seen; None where it is not.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
    """

    num_rounds: int
    strategy: Strategy
    rules: ServerRules
    sample: Callable[[int], list[int]]
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[int, int]
    scales: Mapping[int, float]
    asked: Callable[[int], Asked]
    min_clients: int = 1
    max_norm_ratio: float = 100.0
    max_weight: float = 1.0
    robust: RobustRule = field(default_factory=RobustRule)
    evaluate_every: int = 1
    asked_to_sketch: Callable[[int], Asked] | None = None
    start_rounds: int = 0
    masking: Masking | None = None

    def is_evaluated(self, round: int) -> bool:
        """Tell whether the model is evaluated after a round; one that trained nothing left the base as it was."""
        trained = round - self.start_rounds
        return round == self.num_rounds or (
            self.evaluate_every > 0 and trained > 0 and trained % self.evaluate_every == 0
        )

    def of(self, work: Work) -> RoundPlan:
        """Return the plan of a round of this work: where clients sketch, less is asked, and no server step is taken."""
        if work.payload is not Payload.SKETCH:
            return self
        return replace(self, asked=self.asked_to_sketch or self.asked, rules=replace(self.rules, step=PlainStep()))


def run_rounds(
    state: ServerState,
    plan: RoundPlan,
    engine: Engine,
    evaluate: Callable[[ServerState], Mapping[str, Any]],
    keep: Callable[[Update], None] = lambda update: None,
) -> Iterator[RoundRecord]:
    """Yield one record a round, from the state given to the last round.

    ``evaluate`` scores a state; ``keep`` is shown every update that is used. What is fresh each round and what
    persists is in the state alone, so a loop started from a saved state continues as if never stopped.

    Raises:
        TooFewClientsError: if a round has fewer usable updates than ``plan.min_clients``; the state before it stands.
    """
    while state.round < plan.num_rounds:
        clock = Clock()
        clients = plan.sample(state.round + 1)
        broadcasts = broadcasts_for(state, clients, plan.strategy, plan.ranks, plan.scales, plan.rules.wire)
        work = plan.strategy.client.work(state.round + 1)
        own = plan.of(work)
        agreements = Agreements(broadcasts, work, plan.strategy.weighting)
        arrivals = clock.timed("train", engine.train(broadcasts))
        if plan.masking is not None:
            assert isinstance(plan.strategy, MaskedSums)
            masked = masked_round(own, plan.strategy, work, broadcasts, arrivals)
            aggregate = plan.strategy.rule.of_sum(state, masked.numbers, masked.shares)
            norms, held, began, records = [], masked.held, {}, masked.records(aggregate.weights)
        else:
            intake = Intake(own, work, state, broadcasts)
            aggregate = plan.strategy.aggregate(state, agreements.watched(intake.usable(arrivals, keep)))
            norms, held, began, records = intake.norms, intake.held, intake.began, intake.records(aggregate.weights)
        applied = as_applied(aggregate, plan.rules.wire)
        figures = round_figures(aggregate, applied, state.start, agreements)
        views = views_after(state, broadcasts, began) if plan.rules.wire.is_coded else None
        norms = [] if work.payload is Payload.SKETCH else norms
        state = next_state(state, aggregate, own.rules, norms, held, work.sends, views)
        clock.lap("aggregate")
        evaluation = evaluate(state) if plan.is_evaluated(state.round) else None
        clock.lap("evaluate")
        yield RoundRecord(
            round=state.round,
            state=state,
            clients=records,
            applied=applied,
            figures=figures,
            seconds=clock.seconds,
            evaluation=evaluation,
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
