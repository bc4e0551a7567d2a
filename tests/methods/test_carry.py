"""Carry: the exact mean of the clients' weights, of which everybody continues from the leading directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.federation.server import BroadcastForm, ServerRules, next_state
from fedloom.lora.algebra import distance, norm, stack
from fedloom.lora.initial import A_ROW_NORM
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.carry import Carry
from fedloom.methods.flexlora import FlexLoRA
from fedloom.methods.server_steps import MomentumStep, PlainStep, ServerStep
from fedloom.methods.state import ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.methods.weave import completed
from fedloom.methods.zero_padding import ZeroPadding, fedit
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"q": (24, 18), "v": (7, 24)}
RANKS = (9, 5, 3, 3, 1)
LOSSLESS = ServerRules(PlainStep())


def cohort(ranks: tuple[int, ...] = RANKS) -> Cohort:
    return Cohort(SHAPES, max(ranks), ranks.__getitem__, seed=1)


def moved(start: Adapter, rank: int, size: float, *name: int) -> Adapter:
    """Return a client's first slots of a start, after some training."""
    generator = torch_stream(7, "moved", *name)
    pairs = {}
    for module, pair in start.items():
        own = [pair.b_OR[:, :rank], pair.a_RI[:rank]]
        pairs[module] = Pair(*(x + size * torch.randn(x.shape, generator=generator).to(x) for x in own))
    return Adapter(pairs)


def after_round(
    strategy: Strategy, state: ServerState, clients: list[int], size: float, rules: ServerRules = LOSSLESS
) -> tuple[ServerState, Adapter]:
    """Return the next state, and the clients' mean of all that they add to the base."""
    assert state.start is not None
    updates = []
    for client in clients:
        trained = moved(state.start, strategy.cohort.rank_of(client), size, state.round, client)
        updates.append(Update(state.round + 1, client, trained, TrainingStats(client + 1)))
    whole = sum(client + 1 for client in clients)
    parts = [completed(one.adapter, state.start).to(torch.float64) for one in updates]
    mean = stack(parts, [one.stats.num_rows / whole for one in updates])
    both = [mean] if not state.side else [mean, state.side.to(torch.float64)]
    expected = stack(both, [1.0] * len(both))
    return next_state(state, strategy.aggregate(state, updates), rules, [1.0], {}), expected


def test_over_the_rounds_the_whole_is_the_clients_mean_whoever_takes_part() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        strategy = Carry(cohort())
        state = strategy.initial()
        assert state.start is not None
        state = replace(state, start=state.start.to(dtype))
        for clients in ([0, 1, 2, 3, 4], [4], [2, 3], [1, 4], [0], [3, 1, 0]):
            state, expected = after_round(strategy, state, clients, 0.2)
            found = state.global_adapter()
            assert distance(found, expected) < tolerance * norm(expected)


def test_slots_are_the_leading_directions_of_the_whole_with_an_a_as_long_as_a_random_one() -> None:
    strategy = Carry(cohort())
    state = strategy.initial()
    for number in range(3):
        state, expected = after_round(strategy, state, [0, 1, 2, 3, 4], 0.3 + number)
    assert state.start is not None
    for name, pair in state.start.items():
        values = torch.linalg.svdvals(expected[name].delta())[: pair.rank]
        assert torch.allclose(pair.b_OR.double().norm(dim=0) * A_ROW_NORM, values, rtol=1e-4)
        gram = pair.a_RI @ pair.a_RI.T / A_ROW_NORM**2
        assert torch.allclose(gram, torch.eye(pair.rank), atol=1e-5)


def test_slots_not_in_use_are_those_of_an_ordinary_start() -> None:
    strategy = Carry(cohort())
    state = strategy.initial()
    first = state.start
    assert first is not None
    ended, _ = after_round(strategy, state, [4, 3], 0.2)  # of rank 1 and 3: four directions at most
    assert ended.start is not None
    for name, pair in ended.start.items():
        used = int((pair.b_OR.norm(dim=0) > 0).sum())
        assert 3 <= used <= 4
        assert torch.equal(pair.a_RI[used:], first[name].a_RI[used:])


@pytest.mark.parametrize("clients", [[0, 1, 2, 3, 4], [1, 4]], ids=str)
def test_clients_that_change_nothing_change_nothing_in_20_rounds_in_which_flexlora_fades(clients: list[int]) -> None:
    strategy = Carry(cohort())
    state, expected = after_round(strategy, strategy.initial(), [0, 1, 2, 3, 4], 0.5)
    fading = replace(state, side=Adapter())
    for _ in range(20):
        state, _ = after_round(strategy, state, clients, 0.0)
        fading, _ = after_round(FlexLoRA(cohort()), fading, clients, 0.0)
    assert distance(state.global_adapter(), expected) < 1e-5 * norm(expected)
    assert fading.start is not None
    last = norm(Adapter({"q": Pair(fading.start["q"].b_OR[:, 5:], fading.start["q"].a_RI[5:])}))
    assert last < 1e-3 * norm(expected)


def test_one_client_alone_goes_on_as_if_nobody_aggregated() -> None:
    strategy = Carry(cohort((4,)))
    state, expected = after_round(strategy, strategy.initial(), [0], 0.3)
    assert state.start is not None
    assert distance(state.start, expected) < 1e-6 * norm(expected)
    assert norm(state.side) < 1e-6 * norm(state.start)  # of rank 4, all of it is in the slots that are trained


def test_after_one_step_from_the_same_a_it_is_fedit() -> None:
    ranks = (4, 4, 4)
    found = []
    for strategy in (Carry(cohort(ranks)), fedit(cohort(ranks))):
        state = strategy.initial()
        assert state.start is not None
        updates = []
        for client in range(3):  # B moves from zero; A has no gradient yet
            b = {n: torch.randn(p.b_OR.shape, generator=torch_stream(9, n, client)) for n, p in state.start.items()}
            trained = Adapter({n: Pair(b[n], p.a_RI) for n, p in state.start.items()})
            updates.append(Update(1, client, trained, TrainingStats(client + 1)))
        found.append(strategy.aggregate(state, updates).applied)
    assert distance(*found) < 1e-6 * norm(found[1])


@pytest.mark.parametrize("step", [PlainStep(), PlainStep(1.5), MomentumStep(1.0, 0.5)], ids=str)
def test_what_a_small_broadcast_leaves_out_is_sent_later(step: ServerStep) -> None:
    """Whatever the step: with and without a limit of bytes the whole and what waits add up to the same."""
    strategy = Carry(cohort())
    limited = ServerRules(step, BroadcastForm.COMPRESSED, 0.02, max_bytes=600)
    state, expected = after_round(strategy, strategy.initial(), [0, 1, 2, 3, 4], 0.3, limited)
    assert norm(state.residual) > 0.0
    waiting = stack([state.global_adapter(), state.residual], [1.0, 1.0])
    whole, _ = after_round(strategy, strategy.initial(), [0, 1, 2, 3, 4], 0.3, ServerRules(step))
    assert distance(waiting, whole.global_adapter()) < 1e-5 * norm(expected)
    for _ in range(6):
        state, _ = after_round(strategy, state, [0, 1, 2, 3, 4], 0.0, replace(limited, step=PlainStep()))
    assert norm(state.residual) < 0.05 * norm(waiting)


def test_padding_moves_a_model_that_nobody_trains_and_it_does_not() -> None:
    found = {}
    for strategy in (Carry(cohort()), ZeroPadding(cohort())):
        state = strategy.initial()
        state, _ = after_round(strategy, state, [0, 1, 2, 3, 4], 0.3)
        before = state.global_adapter()
        state, _ = after_round(strategy, state, [0, 1, 2, 3, 4], 0.0)
        found[strategy.name] = distance(state.global_adapter(), before) / norm(before)
    assert found["carry"] < 1e-6
    assert found["zero-padding"] > 0.1
