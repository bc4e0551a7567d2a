"""What only a strategy has, and the law of each method, in float64 on shapes small enough to check by hand.

The laws that a function keeps as well (order, one client, weights, inputs, groups) are those of ``fedloom.audit``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.federation.server import aggregation_noise
from fedloom.lora.algebra import compress, distance, norm, truncate
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.carry import Carry
from fedloom.methods.fedex import FedEx
from fedloom.methods.ffa_lora import FFALoRA
from fedloom.methods.flexlora import FlexLoRA
from fedloom.methods.flora import FLoRA, Initialisation
from fedloom.methods.rolora import RoLoRA
from fedloom.methods.standalone import Standalone
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy, Weighting
from fedloom.methods.zero_padding import ZeroPadding, fedit
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"layers.0.q": (6, 5), "layers.1.v": (3, 5)}
EQUAL, MIXED = {0: 2, 1: 2, 2: 2}, {0: 3, 1: 2, 2: 1}


def cohort(ranks: dict[int, int]) -> Cohort:
    return Cohort(SHAPES, max(ranks.values()), ranks.__getitem__, seed=1)


def random_adapter(seed: int, rank: int) -> Adapter:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=torch_stream(seed, *size), dtype=torch.float64)

    return Adapter({name: Pair(draw(o, rank), draw(rank, i)) for name, (o, i) in SHAPES.items()})


def update(client: int, rank: int, rows: int = 10, seed: int | None = None) -> Update:
    adapter = random_adapter(client if seed is None else seed, rank)
    return Update(1, client, adapter, TrainingStats(rows, rows * 7, rows * 3, 4, 2.0, 1.5, 0.1))


class RoLoRAInRoundTwo(RoLoRA):
    """RoLoRA as it stands after its first round."""

    def initial(self) -> ServerState:
        state = super().initial()
        assert state.start is not None
        b = {f"{n}.b": torch.randn(p.b_OR.shape, generator=torch_stream(5, n)) for n, p in state.start.items()}
        return replace(state, round=1, start=state.start.with_factors(b))


def state_of(strategy: Strategy) -> ServerState:
    state = strategy.initial()
    return replace(state, start=state.start.to(torch.float64)) if state.start else state


def sent(strategy: Strategy, updates: list[Update]) -> list[Update]:
    """Return updates as they arrive: a factor that does not cross is the one that the client was sent."""
    state = state_of(strategy)
    crossing = strategy.client.work(state.round + 1).sends
    arrived = []
    for u in updates:
        start = strategy.start_for(state, u.client)
        whole = u.adapter if isinstance(start, Draw) else start.with_factors(u.adapter.as_tensors(crossing))
        arrived.append(replace(u, adapter=whole))
    return arrived


def mean_delta(updates: list[Update]) -> dict[str, torch.Tensor]:
    total = sum(u.stats.num_rows for u in updates)
    return {n: sum(u.stats.num_rows / total * u.adapter[n].delta() for u in updates) for n in SHAPES}  # type: ignore[misc]


BATTERY: list[tuple[str, Callable[[Cohort], Strategy], dict[int, int]]] = [
    ("fedit", fedit, EQUAL),
    ("zero-padding, equal ranks", ZeroPadding, EQUAL),
    ("zero-padding, mixed ranks", ZeroPadding, MIXED),
    ("zero-padding by norm", lambda c: ZeroPadding(c, Weighting.NORM), MIXED),
    ("fedex-lora", FedEx, EQUAL),
    ("flexlora, equal ranks", FlexLoRA, EQUAL),
    ("flexlora, mixed ranks", FlexLoRA, MIXED),
    ("ffa-lora, equal ranks", FFALoRA, EQUAL),
    ("ffa-lora, mixed ranks", FFALoRA, MIXED),
    ("rolora, b's round, mixed ranks", RoLoRA, MIXED),
    ("rolora, a's round, mixed ranks", RoLoRAInRoundTwo, MIXED),
    ("carry, equal ranks", Carry, EQUAL),
    ("flora, equal ranks", FLoRA, EQUAL),
    ("flora, mixed ranks", FLoRA, MIXED),
    ("flora, shared draws", lambda c: FLoRA(c, initialisation=Initialisation.SHARED), MIXED),
]
every_strategy = pytest.mark.parametrize(("make", "ranks"), [case[1:] for case in BATTERY], ids=[c[0] for c in BATTERY])


def same(left: Aggregate, right: Aggregate) -> bool:
    return distance(left.applied, right.applied) < 1e-12 * max(1.0, norm(left.applied))


@every_strategy
def test_every_client_matters(make: Callable[[Cohort], Strategy], ranks: dict[int, int]) -> None:
    strategy = make(cohort(ranks))
    updates = sent(strategy, [update(k, r) for k, r in ranks.items()])
    before = strategy.aggregate(state_of(strategy), updates)
    for k, rank in ranks.items():
        changed = [*updates[:k], *sent(strategy, [update(k, rank, seed=100)]), *updates[k + 1 :]]
        assert not same(before, strategy.aggregate(state_of(strategy), changed))


@every_strategy
def test_the_weights_sum_to_one(make: Callable[[Cohort], Strategy], ranks: dict[int, int]) -> None:
    strategy = make(cohort(ranks))
    updates = sent(strategy, [update(k, r, rows=k + 1) for k, r in ranks.items()])
    assert sum(strategy.aggregate(state_of(strategy), updates).weights.values()) == pytest.approx(1.0)


@every_strategy
def test_the_ideal_is_the_weighted_mean_of_the_products(
    make: Callable[[Cohort], Strategy], ranks: dict[int, int]
) -> None:
    strategy = make(cohort(ranks))
    updates = sent(strategy, [update(k, r, rows=k + 1) for k, r in ranks.items()])
    ideal = strategy.aggregate(state_of(strategy), updates).ideal
    weights = strategy.aggregate(state_of(strategy), updates).weights
    for name in SHAPES:
        expected = sum(weights[u.client] * u.adapter[name].delta() for u in updates)
        assert torch.allclose(ideal[name].delta(), expected, atol=1e-12)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 50)), min_size=1, max_size=6))
def test_floras_delta_is_the_weighted_mean_of_the_clients_deltas(clients: list[tuple[int, int]]) -> None:
    ranks = {k: rank for k, (rank, _) in enumerate(clients)}
    updates = [update(k, rank, rows) for k, (rank, rows) in enumerate(clients)]
    strategy = FLoRA(cohort(ranks))
    aggregate = strategy.aggregate(strategy.initial(), updates)
    expected = mean_delta(updates)
    assert all(torch.allclose(aggregate.applied[n].delta(), expected[n], atol=1e-12) for n in SHAPES)
    assert aggregation_noise(aggregate.applied, aggregate.ideal) == pytest.approx(0.0, abs=1e-12)


def test_fedits_noise_is_the_weighted_covariance_of_the_factors() -> None:
    strategy, updates = fedit(cohort(EQUAL)), [update(k, 2, rows=k + 1) for k in EQUAL]
    aggregate = strategy.aggregate(state_of(strategy), updates)
    assert aggregate.start is not None
    missing, whole = 0.0, 0.0
    for name, delta in mean_delta(updates).items():
        mean = aggregate.start[name]
        covariance = sum(
            aggregate.weights[u.client] * (u.adapter[name].b_OR - mean.b_OR) @ (u.adapter[name].a_RI - mean.a_RI)
            for u in updates
        )
        missing += float(covariance.square().sum())  # type: ignore[union-attr]
        whole += float(delta.square().sum())
    assert aggregation_noise(aggregate.applied, aggregate.ideal) == pytest.approx((missing / whole) ** 0.5, rel=1e-10)


def test_zero_padding_with_equal_ranks_is_fedit() -> None:
    updates = [update(k, 2, rows=k + 1) for k in EQUAL]
    padded, plain = ZeroPadding(cohort(EQUAL)), fedit(cohort(EQUAL))
    assert same(padded.aggregate(state_of(padded), updates), plain.aggregate(state_of(plain), updates))


def test_norm_weights_are_proportional_to_the_norms_and_equal_norms_are_uniform() -> None:
    by_norm = ZeroPadding(cohort(EQUAL), Weighting.NORM)
    updates = [update(k, 2, rows=k + 1) for k in EQUAL]
    weights = by_norm.aggregate(state_of(by_norm), updates).weights
    norms = [norm(u.adapter) for u in updates]
    assert list(weights.values()) == pytest.approx([n / sum(norms) for n in norms])


def test_a_client_gets_the_first_slots_of_the_padded_mean() -> None:
    strategy = ZeroPadding(cohort(MIXED))
    state = state_of(strategy)
    assert state.start is not None
    for client, rank in MIXED.items():
        assert distance(strategy.start_for(state, client), truncate(state.start, rank)) < 1e-12


def test_flora_draws_one_stream_a_client_or_one_for_all() -> None:
    state = ServerState(round=4)
    independent, shared = FLoRA(cohort(EQUAL)), FLoRA(cohort(EQUAL), initialisation=Initialisation.SHARED)
    assert independent.start_for(state, 0) != independent.start_for(state, 1)
    assert shared.start_for(state, 0) == shared.start_for(state, 1) != shared.start_for(replace(state, round=5), 0)


def test_standalone_shares_nothing_and_sends_nothing() -> None:
    strategy = Standalone(cohort(EQUAL))
    aggregate = strategy.aggregate(strategy.initial(), [update(0, 2), update(1, 2)])
    assert not aggregate.applied
    assert not aggregate.change(None)
    assert strategy.client.work(1).sends == frozenset()
    assert strategy.start_for(ServerState(), 0) != strategy.start_for(ServerState(), 1)


@every_strategy
@pytest.mark.parametrize("grouping", [[(0,), (1, 2)], [(2, 0), (1,)], [(0,), (1,), (2,)]], ids=str)
def test_sums_over_any_groups_merge_to_the_sum_over_all(
    make: Callable[[Cohort], Strategy], ranks: dict[int, int], grouping: list[tuple[int, ...]]
) -> None:
    strategy = make(cohort(ranks))
    state, updates = state_of(strategy), sent(strategy, [update(k, r, rows=k + 1) for k, r in ranks.items()])
    whole = strategy.empty(state)
    for group in grouping:
        part = strategy.empty(state)
        for client in group:
            part.add(updates[client])
        whole.merge(part)
    merged, direct = strategy.finish(state, whole), strategy.aggregate(state, updates)
    assert same(merged, direct)
    assert distance(merged.ideal, direct.ideal) < 1e-12 * norm(direct.ideal)
    assert merged.weights == pytest.approx(direct.weights)
    assert merged.mean_squared_norm == pytest.approx(direct.mean_squared_norm)


# ---- the law of each method ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=["equal ranks", "mixed ranks"])
@pytest.mark.parametrize("make", [FedEx, FFALoRA, RoLoRA, RoLoRAInRoundTwo])
def test_the_global_product_is_the_exact_mean(make: Callable[[Cohort], Strategy], ranks: dict[int, int]) -> None:
    strategy = make(cohort(ranks))
    updates = sent(strategy, [update(k, r, rows=k + 1) for k, r in ranks.items()])
    aggregate = strategy.aggregate(state_of(strategy), updates)
    expected = mean_delta(updates)
    assert all(torch.allclose(aggregate.applied[n].delta(), expected[n], atol=1e-5) for n in SHAPES)
    assert aggregation_noise(aggregate.applied, aggregate.ideal) == pytest.approx(0.0, abs=1e-6)


def test_fedexs_start_is_fedits_and_its_side_the_covariance_of_the_factors() -> None:
    updates = [update(k, 2, rows=k + 1) for k in EQUAL]
    exact, mean = (make(cohort(EQUAL)).aggregate(state_of(make(cohort(EQUAL))), updates) for make in (FedEx, fedit))
    assert exact.start is not None
    assert mean.start is not None
    ours, theirs = exact.start.as_tensors(), mean.start.as_tensors()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    missing = aggregation_noise(mean.applied, mean.ideal)
    assert norm(exact.side) == pytest.approx(missing * norm(mean.ideal), rel=1e-6)  # type: ignore[operator]


def test_flexlora_is_the_best_approximation_of_the_mean_at_the_largest_rank() -> None:
    strategy, updates = FlexLoRA(cohort(MIXED)), [update(k, r, rows=k + 1) for k, r in MIXED.items()]
    aggregate = strategy.aggregate(state_of(strategy), updates)
    for name, expected in mean_delta(updates).items():
        left_out = torch.linalg.svdvals(expected)[max(MIXED.values()) :].norm()
        found = (aggregate.applied[name].delta().double() - expected).norm()
        assert float(found) == pytest.approx(float(left_out), rel=1e-5, abs=1e-6)


def test_flexlora_loses_its_tail_under_clients_that_change_nothing_by_the_share_that_holds_it() -> None:
    strategy, rows = FlexLoRA(cohort(MIXED)), {0: 1, 1: 2, 2: 3}
    state = ServerState(start=truncate(compress(random_adapter(4, 3)).adapter, 3))
    assert state.start is not None
    before = {n: torch.linalg.svdvals(p.delta())[:3] for n, p in state.start.items()}
    for _ in range(4):
        idle = [
            replace(update(k, MIXED[k], rows[k]), adapter=truncate(state.start, MIXED[k]))
            for k in MIXED
            if state.start is not None
        ]
        state = replace(state, start=strategy.aggregate(state, idle).start)
        assert state.start is not None
    coverage = torch.tensor([6 / 6, (1 + 2) / 6, 1 / 6], dtype=torch.float64)
    for name, sigma in before.items():
        after = torch.linalg.svdvals(state.start[name].delta().double())[:3]
        assert torch.allclose(after, sigma.double() * coverage**4, rtol=1e-4, atol=1e-5)


def test_a_factor_at_rest_is_the_servers_own_to_the_bit() -> None:
    for make, factor in ((FFALoRA, "a"), (RoLoRA, "a"), (RoLoRAInRoundTwo, "b")):
        strategy = make(cohort(MIXED))
        state = strategy.initial()
        after = strategy.aggregate(state, sent(strategy, [update(k, r) for k, r in MIXED.items()])).start
        assert state.start is not None
        assert after is not None
        held, kept = (adapter.as_tensors(frozenset(factor)) for adapter in (state.start, after))
        assert all(torch.equal(held[key], kept[key]) for key in held)
