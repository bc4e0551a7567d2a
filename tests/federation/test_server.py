"""The server between two rounds: what a step moves is what the global model moves by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from fedloom.federation import server
from fedloom.federation.blob import WireDtype
from fedloom.federation.coding import num_bytes_of
from fedloom.federation.server import BroadcastForm, ServerRules, aggregation_noise, next_state, within
from fedloom.lora.algebra import compress, distance, norm, stack
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.adaptive_steps import Adaptive, AdaptiveStep
from fedloom.methods.flora import FLoRA
from fedloom.methods.server_steps import FedExPStep, MomentumStep, PlainStep, ServerStep
from fedloom.methods.state import Aggregate, ServerState, StepMemory, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.methods.sums import FactorSum
from fedloom.methods.zero_padding import ZeroPadding
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"layers.0.q": (6, 5), "layers.1.v": (4, 5)}
RANKS = {0: 3, 1: 2, 2: 1}
COHORT = Cohort(SHAPES, 3, RANKS.__getitem__, seed=1)


@dataclass(frozen=True)
class ExactMean(ZeroPadding):
    """A start that is the mean of factors, and a side that holds what it misses."""

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        mean = super().finish(state, sums)
        assert mean.start is not None
        return replace(mean, side=compress(stack([mean.ideal, mean.start], [1.0, -1.0])).adapter)


def updates(round: int) -> list[Update]:
    def draw(client: int, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=torch_stream(round, client, *size), dtype=torch.float64)

    return [
        Update(
            round=round,
            client=client,
            adapter=Adapter({n: Pair(draw(client, o, r), draw(client, r, i)) for n, (o, i) in SHAPES.items()}),
            stats=TrainingStats(client + 1, num_loss_tokens=3),
        )
        for client, r in RANKS.items()
    ]


STEPS = (PlainStep(), PlainStep(1.5), MomentumStep(1.2, 0.5), FedExPStep(), *(AdaptiveStep(k, 0.7) for k in Adaptive))


@pytest.mark.parametrize("step", [*STEPS], ids=str)
@pytest.mark.parametrize("make", [FLoRA, ZeroPadding, ExactMean])
def test_the_global_model_moves_by_what_the_server_step_says(
    make: Callable[[Cohort], Strategy], step: ServerStep
) -> None:
    strategy, rules = make(COHORT), ServerRules(step)
    state = strategy.initial()
    for round in (1, 2, 3):
        aggregate = strategy.aggregate(state, updates(round))
        change = aggregate.change(state.start)
        moved, _ = step.move(change, aggregate.mean_squared_norm, StepMemory(state.velocity, state.moments))
        after = next_state(state, aggregate, rules, [1.0], {})
        wanted = stack([state.global_adapter(), moved], [1.0, 1.0]) if state.global_adapter() else moved
        assert distance(after.global_adapter(), wanted) < 1e-5 * max(1.0, norm(wanted))
        state = after


def test_noise_follows_from_what_is_applied_and_cannot_be_stated() -> None:
    state = ExactMean(COHORT).initial()
    exact, plain = (make(COHORT).aggregate(state, updates(1)) for make in (ExactMean, ZeroPadding))
    assert aggregation_noise(exact.applied, exact.ideal) == pytest.approx(0.0, abs=1e-6)
    without_side = replace(exact, side=Adapter())
    assert aggregation_noise(without_side.applied, exact.ideal) == aggregation_noise(plain.applied, plain.ideal)
    assert aggregation_noise(plain.applied, plain.ideal) > 0.1  # type: ignore[operator]


def random_pair(num_out: int, num_in: int, rank: int) -> Pair:
    generator = torch_stream(3, num_out, num_in, rank)
    return Pair(torch.randn(num_out, rank, generator=generator), torch.randn(rank, num_in, generator=generator))


def cost_of_a_direction(pair: Pair, wire: WireDtype) -> int:
    return num_bytes_of({"one.b": (pair.shape[0], 1), "one.a": (1, pair.shape[1])}, wire)


@pytest.mark.parametrize("wire", [WireDtype.FP32, WireDtype.INT4])
def test_an_addition_within_a_limit_of_bytes_takes_the_directions_of_most_energy_a_byte(wire: WireDtype) -> None:
    whole = compress(Adapter({"wide": random_pair(64, 64, 3), "small": random_pair(8, 8, 3)})).adapter
    cost = {name: cost_of_a_direction(pair, wire) for name, pair in whole.items()}
    worth = {
        name: [float(c) ** 2 / cost[name] for c in pair.b_OR.norm(dim=0) * pair.a_RI.norm(dim=1)]
        for name, pair in whole.items()
    }
    assert within(whole, 0, wire) == {}
    for max_bytes in (cost["wide"], cost["small"] + cost["wide"], 2 * cost["wide"], 10**6):
        ranks = within(whole, max_bytes, wire).ranks
        assert ranks.keys() == whole.keys()
        assert sum(rank * cost[name] for name, rank in ranks.items()) <= max_bytes
        taken = [one for name in whole for one in worth[name][: ranks[name]]]
        left = [one for name in whole for one in worth[name][ranks[name] :]]
        assert min(taken) >= max(left, default=0.0)
    assert within(whole, 10**6, wire).ranks == whole.ranks


def test_what_a_limit_of_bytes_leaves_out_is_sent_in_later_rounds() -> None:
    addition = Adapter({"m": random_pair(12, 10, 4)})
    limit = cost_of_a_direction(addition["m"], WireDtype.FP32)
    rules = ServerRules(PlainStep(), BroadcastForm.COMPRESSED, max_bytes=limit)
    state = ServerState()
    for joining in (addition, *[addition.scaled(0.0)] * 3):
        aggregate = Aggregate(None, joining, joining, 0.0, {0: 1.0})
        state = next_state(state, aggregate, rules, [1.0], {})
        assert state.chain[-1].ranks == {"m": 1}
    assert distance(state.side, addition) < 1e-5 * norm(addition)


@pytest.mark.parametrize("wire", WireDtype)
def test_what_is_sent_and_what_is_held_back_are_the_addition(wire: WireDtype) -> None:
    addition = Adapter({"wide": random_pair(24, 20, 8), "small": random_pair(8, 8, 3)})
    limit = 5 * cost_of_a_direction(addition["wide"], wire)
    rules = ServerRules(PlainStep(), BroadcastForm.COMPRESSED, tolerance=0.01, wire=wire, max_bytes=limit)
    after = next_state(ServerState(), Aggregate(None, addition, addition, 0.0, {0: 1.0}), rules, [1.0], {})
    assert norm(after.residual) > 0.1 * norm(addition)
    assert distance(stack([after.side, after.residual], [1.0, 1.0]), addition) < 1e-5 * norm(addition)


def test_a_residual_keeps_its_strongest_directions_up_to_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    addition = Adapter({"m": random_pair(24, 20, 8)})
    limit = cost_of_a_direction(addition["m"], WireDtype.FP32)
    rules = ServerRules(PlainStep(), BroadcastForm.COMPRESSED, max_bytes=limit)
    monkeypatch.setattr(server, "RESIDUAL_RANK", 3)
    after = next_state(ServerState(), Aggregate(None, addition, addition, 0.0, {0: 1.0}), rules, [1.0], {})
    kept = stack([after.side, after.residual], [1.0, 1.0])
    assert (after.side.ranks, after.residual.ranks) == ({"m": 1}, {"m": 3})
    assert distance(kept, addition) == pytest.approx(compress(addition, rank=4).error, rel=1e-4)
