"""Combining adapters in one call: a strategy's own result, and what cannot be combined is refused in one line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import AdapterError
from fedloom.lora.algebra import distance, stack
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods import table
from fedloom.methods.combination import aggregate
from fedloom.methods.makers import zero_padding
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.methods.table import Method, MethodOptions
from fedloom.methods.traits import Traits
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

COMBINING = table.shipped("combines")


def adapter(num_out: int = 7, num_in: int = 5, value: float = 1.0, module: str = "layer") -> Adapter:
    return Adapter({module: Pair(torch.full((num_out, 2), value), torch.ones(2, num_in))})


def random_pair(seed: int, rank: int, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (7, 5)) -> Pair:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=torch_stream(seed, *size), dtype=torch.float64).to(dtype)

    return Pair(draw(shape[0], rank), draw(rank, shape[1]))


def mean_of_factors(pairs: list[Pair], shares: list[float]) -> torch.Tensor:
    """Return the product of the means of the factors, padded with zeros to the largest rank, by the formula."""
    rank = max(pair.rank for pair in pairs)
    b_OR, a_RI = torch.zeros(pairs[0].shape[0], rank).double(), torch.zeros(rank, pairs[0].shape[1]).double()
    for pair, share in zip(pairs, shares, strict=True):
        b_OR[:, : pair.rank] += share * pair.b_OR.double()
        a_RI[: pair.rank] += share * pair.a_RI.double()
    return b_OR @ a_RI


def by_formula(method: str, exact: torch.Tensor, pairs: list[Pair], shares: list[float]) -> torch.Tensor:
    match method:
        case "flora" | "fedex-lora":
            return exact
        case "flexlora":
            u, sigma, vt = torch.linalg.svd(exact)
            kept = min(max(pair.rank for pair in pairs), len(sigma))
            return u[:, :kept] @ sigma[:kept].diag() @ vt[:kept]
        case _:
            return mean_of_factors(pairs, shares)


@settings(max_examples=25, deadline=None)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
@pytest.mark.parametrize("method", COMBINING)
def test_the_product_is_that_of_the_papers_formula(method: str, ranks: list[int], seed: int) -> None:
    if table.traits_of(method).needs_one_rank:
        ranks = [ranks[0]] * len(ranks)
    pairs = [random_pair(seed + k, rank) for k, rank in enumerate(ranks)]
    weights = [float(k + 1) for k in range(len(pairs))]
    shares = [weight / sum(weights) for weight in weights]
    found = aggregate([Adapter({"layer": pair}) for pair in pairs], weights, method)["layer"].delta()
    exact = sum(share * pair.delta() for share, pair in zip(shares, pairs, strict=True))
    assert torch.allclose(found, by_formula(method, exact, pairs, shares), atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", COMBINING)
def test_the_formula_holds_for_adapters_on_a_device_and_the_result_stays_there(method: str, device: str) -> None:
    ranks = (2, 2, 2) if table.traits_of(method).needs_one_rank else (3, 1, 2)
    pairs, weights = [random_pair(k, rank) for k, rank in enumerate(ranks)], [0.5, 0.25, 0.25]
    adapters = [Adapter({"layer": pair}).to(device) for pair in pairs]
    before = [adapter["layer"].delta().clone() for adapter in adapters]
    found = aggregate(adapters, weights, method)["layer"]
    assert found.b_OR.device.type == found.a_RI.device.type == device
    exact = sum(weight * pair.delta() for weight, pair in zip(weights, pairs, strict=True))
    expected = by_formula(method, exact, pairs, weights)  # type: ignore[arg-type]
    assert torch.allclose(found.delta().cpu(), expected, atol=1e-12)
    order = [2, 0, 1]
    again = aggregate([adapters[k] for k in order], [weights[k] for k in order], method)["layer"].delta()
    assert torch.allclose(again.cpu(), expected, atol=1e-12)
    assert all(torch.equal(adapter["layer"].delta(), old) for adapter, old in zip(adapters, before, strict=True))


@pytest.mark.parametrize("method", COMBINING)
def test_it_is_what_a_server_puts_in_place_of_its_clients_adapters(method: str) -> None:
    pairs = [random_pair(k, 2, torch.float32) for k in range(3)]
    adapters = [Adapter({"layer": pair}) for pair in pairs]
    cohort = Cohort({"layer": (7, 5)}, 2, lambda client: 2, 1)
    strategy: Strategy = table.make(method, cohort)
    updates = [Update(1, k, one, TrainingStats(10 * (k + 1), 1, 1, 1)) for k, one in enumerate(adapters)]
    applied = strategy.aggregate(strategy.initial(), updates).applied
    assert distance(aggregate(adapters, [10, 20, 30], method), applied) < 1e-6


@pytest.mark.parametrize("method", COMBINING)
def test_a_mistake_in_a_strategy_shows(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one implementation: what a strategy forgets is missing here too."""
    adapters = [Adapter({"layer": random_pair(k, 2)}) for k in range(3)]
    kind = type(table.make(method, Cohort({"layer": (7, 5)}, 2, lambda client: 2, 1)))
    whole, before = kind.aggregate, aggregate(adapters, method=method)

    def forgetful(self: Strategy, state: ServerState, updates: Iterator[Update]) -> Aggregate:
        return whole(self, state, list(updates)[:1])

    monkeypatch.setattr(kind, "aggregate", forgetful)
    assert distance(aggregate(adapters, method=method), before) > 0.1


@pytest.mark.parametrize("method", COMBINING)
def test_modules_of_other_ranks_dtypes_and_shapes_keep_theirs(method: str) -> None:
    kinds = {"a": (2, torch.float32, (7, 5)), "b": (3, torch.float64, (4, 6)), "c": (1, torch.bfloat16, (7, 5))}

    def made(seed: int) -> Adapter:
        return Adapter({name: random_pair(seed, *kind) for name, kind in kinds.items()})

    found = aggregate([made(1), made(2)], method=method)
    assert list(found) == list(kinds)
    for name, (rank, dtype, shape) in kinds.items():
        assert (found[name].b_OR.dtype, found[name].shape) == (dtype, shape)
        if method != "fedex-lora":  # whose residual has the rank that its dtype's rounding leaves
            assert found[name].rank == (2 * rank if method == "flora" else rank)


@pytest.mark.parametrize("method", COMBINING)
def test_a_module_of_two_dtypes_gets_the_finer_one(method: str) -> None:
    coarse, fine = (Adapter({"layer": random_pair(1, 2, dtype)}) for dtype in (torch.float32, torch.float64))
    for adapters in ([coarse, fine], [fine, coarse]):
        assert aggregate(adapters, method=method)["layer"].b_OR.dtype == torch.float64


@pytest.mark.parametrize("method", COMBINING)
def test_a_rank_above_a_modules_sides_is_combined_as_well(method: str) -> None:
    adapters = [Adapter({"layer": random_pair(k, 11)}) for k in range(2)]
    ranks = {"flora": 22, "fedex-lora": 11 + 5}
    assert aggregate(adapters, method=method)["layer"].rank == ranks.get(method, 11)


def test_fedit_misses_the_mean_delta_by_the_weighted_covariance_of_the_factors() -> None:
    adapters, weights = [Adapter({"layer": random_pair(k, 3)}) for k in range(4)], [0.4, 0.3, 0.2, 0.1]
    mean = aggregate(adapters, weights, "fedit")["layer"]
    centred = [
        Adapter({"layer": Pair(one["layer"].b_OR - mean.b_OR, one["layer"].a_RI - mean.a_RI)}) for one in adapters
    ]
    missed = stack(adapters, weights)["layer"].delta() - mean.delta()
    assert torch.allclose(missed, stack(centred, weights)["layer"].delta(), atol=1e-12)


@pytest.mark.parametrize(("method", "moves"), [("flora", False), ("fedit", True)])
def test_only_the_stack_ignores_how_a_pair_is_factored(method: str, moves: bool) -> None:
    pairs, turn = [random_pair(k, 3) for k in range(2)], random_pair(9, 3, shape=(3, 3)).delta()
    turned = Pair(pairs[0].b_OR @ turn, torch.linalg.solve(turn, pairs[0].a_RI))
    before, after = (
        aggregate([Adapter({"layer": first}), Adapter({"layer": pairs[1]})], method=method)
        for first in (pairs[0], turned)
    )
    assert (distance(before, after) > 1e-9) == moves


def test_a_method_of_ones_own_is_combined_by_its_own_strategy() -> None:
    def only_the_first(cohort: Cohort, options: MethodOptions) -> Strategy:
        assert cohort.max_rank == cohort.rank_of(1) == 2
        return replace(zero_padding(cohort, options), name="mine")  # type: ignore[type-var]

    table.register_method(Method(Traits("mine", "ours"), only_the_first))
    try:
        found = aggregate([adapter(), adapter(value=3.0)], method="mine")
    finally:
        table.unregister_method("mine")
    assert found["layer"].b_OR.unique().tolist() == [2.0]


@pytest.mark.parametrize("method", ["base", "standalone", "splitlora", "floar"])
def test_a_method_that_combines_nothing_is_refused(method: str) -> None:
    with pytest.raises(AdapterError, match=f"method: expected one of fedit, zero-padding, flora.*, got '{method}'"):
        aggregate([adapter()], method=method)


def test_ranks_that_differ_are_refused_where_one_is_needed() -> None:
    longer = Adapter({"layer": random_pair(1, 3, torch.float32)})
    with pytest.raises(
        AdapterError, match=r"fedit: expected one rank .*, got 2 and 3 at layer; use zero-padding, flora or"
    ):
        aggregate([adapter(), longer], method="fedit")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", COMBINING)
def test_an_adapter_that_is_not_finite_is_refused_even_where_it_weighs_nothing(method: str, value: float) -> None:
    with pytest.raises(AdapterError, match=r"adapters\[1\]: expected finite numbers, got NaN or infinity at layer"):
        aggregate([adapter(), adapter(value=value)], [1.0, 0.0], method)


@pytest.mark.parametrize("method", COMBINING)
@pytest.mark.parametrize("shape", [(8, 5), (7, 6), (1, 1)])
def test_adapters_of_two_shapes_are_refused(method: str, shape: tuple[int, int]) -> None:
    with pytest.raises(AdapterError, match=r"layer: expected one shape .*, got \(7, 5\) and "):
        aggregate([adapter(), adapter(*shape)], method=method)


@pytest.mark.parametrize("method", COMBINING)
def test_adapters_of_other_modules_or_of_none_are_refused(method: str) -> None:
    with pytest.raises(AdapterError, match="expected adapters of the same modules, layer is in one"):
        aggregate([adapter(), adapter(module="other")], method=method)
    with pytest.raises(AdapterError, match=r"adapters\[0\]: expected at least one module, got an empty adapter"):
        aggregate([Adapter(), Adapter()], method=method)


@pytest.mark.parametrize("weights", [[1e308] * 3, [math.nan, 1, 1], [2, -1, 1], [0, 0, 0], [1, 1], ["1", "1", "1"]])
def test_weights_that_give_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(AdapterError, match=r"weights: expected one for each .*, got .* for 3 adapters"):
        aggregate([adapter()] * 3, weights)
