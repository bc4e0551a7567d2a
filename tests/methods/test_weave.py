"""Weave's sums: exact at any ranks, however they are grouped, and no larger than what the clients sent."""

from __future__ import annotations

import torch

from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import Update
from fedloom.methods.strategy import Cohort, Weighting
from fedloom.methods.weave import Weave, completed
from fedloom.training.stats import TrainingStats

RANKS = (5, 3, 2, 1)
SHAPES = {"q": (12, 9), "v": (7, 12)}


def updates(strategy: Weave) -> list[Update]:
    generator = torch.Generator().manual_seed(1)
    start = strategy.initial().start
    assert start is not None
    found = []
    for client, rank in enumerate(RANKS):
        pairs = {
            name: Pair(
                torch.randn(pair.shape[0], rank, generator=generator),
                pair.a_RI[:rank] + torch.randn(rank, pair.shape[1], generator=generator),
            )
            for name, pair in start.items()
        }
        found.append(Update(1, client, Adapter(pairs), TrainingStats(num_rows=client + 1)))
    return found


def test_the_sum_is_of_the_rank_that_clients_sent_and_of_the_start_and_equals_the_dense_mean() -> None:
    strategy = Weave(Cohort(SHAPES, max(RANKS), RANKS.__getitem__, seed=1), Weighting.ROWS)
    state = strategy.initial()
    assert state.start is not None
    # A start of zeros would hide what is carried.
    state = state.__class__(start=Adapter({n: Pair(p.b_OR + 0.3, p.a_RI) for n, p in state.start.items()}))
    sent = updates(strategy)
    sums, first, second = (strategy.empty(state) for _ in range(3))
    for update in sent:
        sums.add(update)
    for part, some in ((first, sent[:1]), (second, sent[1:])):
        for update in some:
            part.add(update)
    first.merge(second)
    whole = sum(update.stats.num_rows for update in sent)
    for name in SHAPES:
        dense = sum(
            update.stats.num_rows
            / whole
            * completed(update.adapter, state.start)[name].b_OR.double()
            @ completed(update.adapter, state.start)[name].a_RI.double()
            for update in sent
        )
        for mean in (sums.mean_product()[name], first.mean_product()[name]):
            assert mean.rank <= sum(RANKS) + max(RANKS)
            torch.testing.assert_close(mean.b_OR @ mean.a_RI, dense, rtol=1e-12, atol=1e-12)
    squares = sum(
        update.stats.num_rows
        / whole
        * sum(
            float((pair.b_OR.double() @ pair.a_RI.double() - old.b_OR.double() @ old.a_RI.double()).square().sum())
            for pair, old in zip(completed(update.adapter, state.start).values(), state.start.values(), strict=True)
        )
        for update in sent
    )
    assert abs(sums.mean_squared_norm - squares) < 1e-9 * squares
