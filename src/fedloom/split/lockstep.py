"""The split loop, to be read beside SplitLoRA's Algorithm 1.

Per step: clients forward, activations up, server forward and backward, gradients down, clients backward, and server and
clients step once. Every I steps the client-side adapters are aggregated, after their step, by the strategies that also
aggregate whole adapters. A client that fails is dropped until the next aggregation, and the record says why.

Source: SplitLoRA (arXiv 2407.00952). Deviations from its release: one snapshot per client, taken after the step; the
schedule drives both halves; nothing but activations, labels and gradients crosses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.federation.rounds import Clock
from fedloom.split.client_record import SplitClientRecord
from fedloom.split.parties import SplitParties
from fedloom.split.period import Period
from fedloom.split.split_state import SplitState


@dataclass(frozen=True, eq=False)
class SplitRecord:
    """All there is to know of an aggregation period that has ended."""

    round: int
    state: SplitState
    clients: tuple[SplitClientRecord, ...]
    num_steps: int
    loss_nats: float
    loss_last_nats: float
    aggregation_noise: float | None
    seconds: Mapping[str, float]
    evaluation: Mapping[str, Any] | None


def run_split(
    state: SplitState,
    parties: SplitParties,
    evaluate: Callable[[SplitState], Mapping[str, Any]],
    *,
    evaluate_every: int = 1,
    on_step: Callable[[int, float], None] = lambda step, loss_nats: None,
) -> Iterator[SplitRecord]:
    """Yield one record per aggregation period, from the state given to the last round.

    Raises:
        TooFewClientsError: if fewer than ``plan.min_clients`` are left; the state before the period stands.
    """
    plan = parties.plan
    if state.round > 0:
        parties.clients.restore(state.round, [segment.side for segment in state.segments])
    while state.round < plan.num_rounds:
        clock = Clock()
        period = Period(parties, state)
        steps = plan.steps(state.round + 1)
        for step in steps:
            on_step(step, period.step(step))
        clock.lap("train")
        state, noise, records = period.aggregate()
        clock.lap("aggregate")
        is_last = state.round == plan.num_rounds
        is_due = is_last or (evaluate_every > 0 and state.round % evaluate_every == 0)
        evaluation = evaluate(state) if is_due else None
        clock.lap("evaluate")
        loss, last = period.mean_loss(), period.last_loss
        yield SplitRecord(state.round, state, records, len(steps), loss, last, noise, clock.seconds, evaluation)
