"""Strategies around others: the server steps with the clients' own AdamW, and moments are averaged by slot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedloom.lora.algebra import truncate
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods import table
from fedloom.methods.around import SynchronisedSteps
from fedloom.methods.client_half import Payload
from fedloom.methods.options import MethodOptions, ServerAdamW
from fedloom.methods.state import Update
from fedloom.methods.strategy import Cohort
from fedloom.seeding import torch_stream
from fedloom.training.optimiser import AdamWSettings, ClientOptimiser, schedule
from fedloom.training.stats import TrainingStats

SHAPES = {"m": (5, 4), "n": (3, 6)}
RANKS = {0: 3, 1: 2, 2: 1}
COHORT = Cohort(SHAPES, 3, RANKS.__getitem__, seed=1)
SCALE = 2.0
ADAMW = ServerAdamW(1e-2, weight_decay=0.1, max_grad_norm=0.5, schedule="linear", total_steps=5, scale=SCALE)


def gradient(rank: int, *seed: int) -> Adapter:
    generator = torch_stream(3, *seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    return Adapter({name: Pair(normal(o, rank), normal(rank, i)) for name, (o, i) in SHAPES.items()})


def update(round: int, client: int, adapter: Adapter, weight: float = 1.0) -> Update:
    return Update(round, client, adapter, TrainingStats(1), weight=weight)


@pytest.mark.parametrize("name", [name for name in table.shipped("averages_factors") if name != "ffa-lora"])
def test_a_servers_steps_are_those_of_one_adamw_over_the_rows(name: str) -> None:
    ranks = dict.fromkeys(RANKS, 3) if table.traits_of(name).needs_one_rank else RANKS
    strategy = table.make(name, COHORT, MethodOptions(adamw=ADAMW))
    assert isinstance(strategy, SynchronisedSteps)
    assert strategy.client.work(1).payload is Payload.GRADIENT
    state = strategy.initial()
    assert state.start is not None
    raw = {f"{n}.a": nn.Parameter(p.a_RI.clone()) for n, p in state.start.items()}
    raw |= {f"{n}.b": nn.Parameter(p.b_OR.T.contiguous() / SCALE) for n, p in state.start.items()}
    numbers = AdamWSettings(ADAMW.learning_rate, ADAMW.betas, ADAMW.weight_decay, ADAMW.max_grad_norm)
    reference = ClientOptimiser(raw, numbers, schedule("linear", 0, 5))
    for round in range(1, 5):
        sent = {client: gradient(rank, round, client) for client, rank in ranks.items() if (round + client) % 3}
        weights = {client: 1.0 + client for client in sent}
        aggregate = strategy.aggregate(state, [update(round, c, g, weights[c]) for c, g in sent.items()])
        for key, parameter in raw.items():
            module, factor = key.split(".")
            whole = torch.zeros_like(parameter)
            for client, one in sent.items():
                own = one[module].a_RI if factor == "a" else one[module].b_OR.T * SCALE
                whole[: len(own)] += weights[client] / sum(weights.values()) * own
            parameter.grad = whole
        reference.step()
        state = replace(state, round=round, start=aggregate.start, optimiser=aggregate.optimiser)
        assert state.start is not None
        for n, pair in state.start.items():
            assert torch.allclose(pair.a_RI, raw[f"{n}.a"], atol=1e-6)
            assert torch.allclose(pair.b_OR, raw[f"{n}.b"].T * SCALE, atol=1e-6)
    assert not aggregate.side


def test_a_frozen_factor_stays_at_rest_under_the_servers_adamw() -> None:
    strategy = table.make("ffa-lora", COHORT, MethodOptions(adamw=ADAMW))
    state = strategy.initial()
    sent = gradient(3, 1)
    zeros = Adapter({n: Pair(p.b_OR, torch.zeros_like(p.a_RI)) for n, p in sent.items()})
    ended = strategy.aggregate(state, [update(1, 0, zeros)]).start
    assert ended is not None
    assert state.start is not None
    for name, pair in ended.items():
        assert torch.equal(pair.a_RI, state.start[name].a_RI)
        assert not torch.equal(pair.b_OR, state.start[name].b_OR)


def test_second_moments_are_averaged_by_slot_and_one_that_nobody_has_keeps_what_it_was() -> None:
    strategy = table.make("zero-padding", COHORT, MethodOptions(moments="shared"))
    state = strategy.initial()
    before = {"m.a.rows": torch.tensor([8.0, 8.0, 8.0])}
    updates = []
    for client, (rank, weight) in enumerate(((2, 1.0), (1, 3.0))):
        assert state.start is not None
        moments = {"m.a.rows": torch.full((rank,), float(client + 1) * 4)}
        updates.append(replace(update(1, client, truncate(state.start, rank), weight), moments=moments))
    found = strategy.aggregate(replace(state, optimiser=before), updates).optimiser["m.a.rows"]
    assert found.tolist() == [(4 * 1 + 8 * 3) / 4, 4.0, 8.0]
    parts = [strategy.empty(state) for _ in updates]
    for part, one in zip(parts, updates, strict=True):
        part.add(one)
    parts[1].merge(parts[0])
    merged = strategy.finish(replace(state, optimiser=before), parts[1]).optimiser["m.a.rows"]
    assert merged.tolist() == found.tolist()


def test_the_mean_of_all_moves_is_that_of_the_clients_and_shared_with_those_that_were_away() -> None:
    strategy = table.make("fedit", COHORT, MethodOptions(weighting="uniform", control_clients=4))
    state = strategy.initial()
    assert state.start is not None
    assert strategy.client.work(1).corrects
    moved = {client: gradient(3, client) for client in (0, 1)}
    sent = [
        update(1, client, Adapter({n: Pair(p.b_OR + by[n].b_OR, p.a_RI + by[n].a_RI) for n, p in state.start.items()}))
        for client, by in moved.items()
    ]
    control = strategy.aggregate(state, sent).control
    for name in SHAPES:
        half = -0.5 * (moved[0][name].a_RI + moved[1][name].a_RI) * 0.5  # two of four clients
        assert torch.allclose(control[f"{name}.a"], half, atol=1e-6)
    again = strategy.aggregate(replace(state, round=1, control=control), sent).control
    assert all(torch.allclose(again[key], 1.5 * control[key], atol=1e-6) for key in control)
