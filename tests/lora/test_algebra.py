"""Laws of the low-rank algebra, in float64 on shapes small enough to check by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import AdapterError
from fedloom.lora import algebra
from fedloom.lora.pair import Adapter, Pair

TOLERANCE = 1e-12


def random_pair(seed: int, num_out: int, num_in: int, rank: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(num_out, rank, generator=generator, dtype=torch.float64)
    return Pair(b, torch.randn(rank, num_in, generator=generator, dtype=torch.float64))


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[Pair], list[float]]:
    num_out, num_in = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    ranks = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    weights = draw(st.lists(st.floats(0, 1), min_size=len(ranks), max_size=len(ranks)))
    return [random_pair(k, num_out, num_in, rank) for k, rank in enumerate(ranks)], weights


def dense_sum(pairs: list[Pair], weights: list[float]) -> torch.Tensor:
    return sum((w * pair.delta() for pair, w in zip(pairs, weights, strict=True)), torch.zeros(pairs[0].shape).double())


@given(cohorts())
def test_the_stack_is_the_weighted_sum_of_the_deltas(cohort: tuple[list[Pair], list[float]]) -> None:
    pairs, weights = cohort
    assert torch.allclose(algebra.stack_pairs(pairs, weights).delta(), dense_sum(pairs, weights), atol=TOLERANCE)


def test_the_stack_is_the_weighted_sum_on_a_device(device: str) -> None:
    pairs, weights = [random_pair(k, 7, 5, rank) for k, rank in enumerate((3, 1, 2))], [0.5, 0.0, 2.0]
    stacked = algebra.stack_pairs([pair.to(device) for pair in pairs], weights)
    assert stacked.b_OR.device.type == stacked.a_RI.device.type == device
    assert torch.allclose(stacked.delta().cpu(), dense_sum(pairs, weights), atol=TOLERANCE)


@pytest.mark.parametrize(("shape", "rank"), [((20, 15), 8), ((6, 5), 8)], ids=["below the sides", "above them"])
def test_compression_on_a_device_keeps_the_product_and_is_the_cpus(
    device: str, shape: tuple[int, int], rank: int
) -> None:
    pair = random_pair(1, *shape, rank)
    whole, cut = algebra.compress_pair(pair.to(device)), algebra.compress_pair(pair.to(device), rank=3)
    assert torch.allclose(whole.pair.delta().cpu(), pair.delta(), atol=1e-11)
    expected = algebra.compress_pair(pair, rank=3)
    assert cut.pair.b_OR.device.type == device
    assert torch.allclose(cut.pair.delta().cpu(), expected.pair.delta(), atol=1e-11)
    assert cut.error == pytest.approx(float(torch.linalg.matrix_norm(pair.delta() - cut.pair.delta().cpu())), rel=1e-9)


def test_norms_and_distances_on_a_device_are_the_dense_ones(device: str) -> None:
    left, right = random_pair(1, 20, 15, 4), random_pair(2, 20, 15, 3)
    there, other = Adapter({"m": left}).to(device), Adapter({"m": right}).to(device)
    assert algebra.norm(there) == pytest.approx(float(left.delta().norm()), rel=1e-10)
    assert algebra.inner(there, other) == pytest.approx(float((left.delta() * right.delta()).sum()), rel=1e-10)
    assert algebra.distance(there, other) == pytest.approx(float((left.delta() - right.delta()).norm()), rel=1e-10)


def test_adapters_of_different_modules_are_united_on_a_device(device: str) -> None:
    one, two = random_pair(1, 6, 5, 2), random_pair(2, 4, 5, 3)
    both = Adapter({"first": one, "second": two}).to(device)
    united = algebra.united([both, Adapter({"second": two}).to(device)])
    assert {pair.b_OR.device.type for pair in united.values()} == {device}
    assert torch.allclose(united["first"].delta().cpu(), one.delta(), atol=TOLERANCE)
    assert torch.allclose(united["second"].delta().cpu(), 2.0 * two.delta(), atol=TOLERANCE)


@given(cohorts())
def test_lossless_compression_keeps_the_delta_and_never_exceeds_the_smaller_side(
    cohort: tuple[list[Pair], list[float]],
) -> None:
    stacked = algebra.stack_pairs(*cohort)
    compressed = algebra.compress_pair(stacked)
    assert torch.allclose(compressed.pair.delta(), stacked.delta(), atol=1e-11)
    assert compressed.pair.rank <= min(stacked.rank, *stacked.shape)


def test_the_reported_error_is_the_dense_distance_and_no_random_pair_beats_it() -> None:
    pair = random_pair(1, 20, 15, 8)
    compressed = algebra.compress_pair(pair, rank=3)
    assert compressed.error == pytest.approx(
        float(torch.linalg.matrix_norm(pair.delta() - compressed.pair.delta())), rel=1e-10
    )
    rivals = (random_pair(seed, 20, 15, 3) for seed in range(2, 20))
    assert all(algebra.norm_of_difference(pair, rival) > compressed.error for rival in rivals)


def test_the_tolerance_bounds_the_energy_that_is_dropped() -> None:
    pair = random_pair(1, 20, 15, 8)
    compressed = algebra.compress_pair(pair, tolerance=0.1)
    assert compressed.pair.rank < 8
    assert compressed.error**2 <= 0.1 * algebra.norm_of_pair(pair) ** 2


def wide_pair(sigma: torch.Tensor, num_out: int = 11008, num_in: int = 256) -> Pair:
    """Return a balanced float32 pair of these singular values, of a width at which ``width · eps`` is 1.3e-3."""
    pair = random_pair(1, num_out, num_in, len(sigma))
    u, v = torch.linalg.qr(pair.b_OR).Q, torch.linalg.qr(pair.a_RI.T).Q
    return Pair(u * sigma.sqrt(), (v * sigma.sqrt()).T).to(torch.float32)


@pytest.mark.parametrize("sigma", [torch.logspace(0, -4, 16), torch.tensor([1.0] + [1e-3] * 15)])
def test_lossless_compression_loses_rounding_only_whatever_the_width(sigma: torch.Tensor) -> None:
    pair = wide_pair(sigma)
    compressed = algebra.compress_pair(pair)
    assert compressed.pair.rank == 16
    assert algebra.norm_of_difference(compressed.pair, pair) < 1e-7 * algebra.norm_of_pair(pair)


def test_directions_that_rounding_made_are_dropped() -> None:
    pair = wide_pair(torch.logspace(0, -4, 16))
    again = algebra.compress_pair(pair).pair
    assert algebra.compress_pair(algebra.stack_pairs([pair, again], [1.0, 0.3])).pair.rank == 16
    assert algebra.compress_pair(algebra.stack_pairs([pair, again], [1.0, -1.0])).pair.rank == 0


@pytest.mark.parametrize("rank", [None, 3])
def test_the_reported_error_counts_the_rounding_of_what_is_kept(rank: int | None) -> None:
    pair = random_pair(1, 400, 300, 8).to(torch.float32)
    compressed = algebra.compress_pair(pair, rank=rank)
    distance = algebra.norm_of_difference(compressed.pair, pair)
    assert 0.0 < distance == pytest.approx(compressed.error, rel=0.05)


def test_compression_of_nothing_is_rank_zero() -> None:
    assert algebra.compress_pair(Pair(torch.zeros(4, 2), torch.ones(2, 3))).pair.rank == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(number: float, dtype: torch.dtype) -> None:
    b, a = torch.zeros(5, 2, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    assert Pair(b, a).is_finite()
    assert Pair(b[:, :0], a[:0]).is_finite()
    for factor in (b, a):
        factor[1, 1] = number
        assert not Pair(b, a).is_finite()
        assert not Pair(a.T, b.T).is_finite()
        factor[1, 1] = torch.finfo(dtype).max
        assert Pair(b, a).is_finite()


def test_compression_refuses_what_is_not_finite() -> None:
    with pytest.raises(AdapterError, match="finite"):
        algebra.compress_pair(Pair(torch.full((4, 2), math.nan), torch.ones(2, 3)))
    with pytest.raises(AdapterError, match=r"got NaN or infinity at layers\.1; drop it"):
        algebra.compress(Adapter({"layers.1": Pair(torch.full((4, 2), math.inf), torch.ones(2, 3))}))


@pytest.mark.parametrize("rank", [0, -1, -20, 2.0, math.nan])
def test_a_rank_that_is_not_a_whole_number_of_1_or_more_is_refused(rank: int) -> None:
    with pytest.raises(AdapterError, match=f"rank: expected a whole number of 1 or more to compress to, got {rank}"):
        algebra.compress(Adapter({"layer": random_pair(1, 6, 5, 4)}), rank=rank)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, 2.0, math.nan])
def test_a_tolerance_that_is_not_a_share_below_1_is_refused(tolerance: float) -> None:
    with pytest.raises(AdapterError, match=f"at least 0 and below 1, got {tolerance}"):
        algebra.compress(Adapter({"layer": random_pair(1, 6, 5, 4)}), tolerance=tolerance)


def test_padding_keeps_the_delta_and_truncation_keeps_the_first_slots() -> None:
    pair = random_pair(3, 5, 4, 2)
    padded = algebra.pad_pair(pair, 6)
    assert padded.rank == 6
    assert torch.equal(padded.delta(), pair.delta())
    assert torch.equal(algebra.truncate_pair(padded, 2).b_OR, pair.b_OR)


@given(cohorts())
def test_inner_products_and_norms_equal_the_dense_ones(cohort: tuple[list[Pair], list[float]]) -> None:
    left, right = cohort[0][0], cohort[0][-1]
    assert algebra.inner_of_pairs(left, right) == pytest.approx(float((left.delta() * right.delta()).sum()), abs=1e-9)
    assert algebra.norm_of_pair(left) == pytest.approx(float(torch.linalg.matrix_norm(left.delta())), rel=1e-9)
    expected = float(torch.linalg.matrix_norm(left.delta() - right.delta()))
    assert algebra.norm_of_difference(left, right) == pytest.approx(expected, abs=1e-9)


def test_the_distance_of_nearly_equal_pairs_does_not_cancel_away() -> None:
    pair = random_pair(5, 40, 30, 4)
    moved = Pair(pair.b_OR * (1 + 1e-12), pair.a_RI)
    assert algebra.norm_of_difference(moved, pair) == pytest.approx(1e-12 * algebra.norm_of_pair(pair), rel=0.05)


def test_the_stack_ignores_how_a_pair_is_factored() -> None:
    pairs, weights = [random_pair(k, 6, 5, 3) for k in range(2)], [0.5, 0.5]
    turn = random_pair(9, 3, 3, 3).delta()
    turned = [Pair(pairs[0].b_OR @ turn, torch.linalg.solve(turn, pairs[0].a_RI)), pairs[1]]
    assert torch.allclose(
        algebra.stack_pairs(turned, weights).delta(), algebra.stack_pairs(pairs, weights).delta(), atol=1e-10
    )


def test_adapters_of_different_modules_are_not_combined() -> None:
    pair = random_pair(1, 3, 3, 1)
    with pytest.raises(AdapterError, match="same modules, right"):
        algebra.stack([Adapter({"left": pair}), Adapter({"left": pair, "right": pair})], [0.5, 0.5])


def test_a_pair_of_two_ranks_is_refused() -> None:
    with pytest.raises(AdapterError, match="one rank"):
        Pair(torch.zeros(4, 2), torch.zeros(3, 4))


def test_an_adapter_survives_its_serialised_form() -> None:
    adapter = Adapter({"layers.0.q": random_pair(1, 4, 3, 2), "layers.1.q": random_pair(2, 4, 3, 1)})
    back = Adapter.from_tensors(adapter.as_tensors())
    assert list(back) == list(adapter)
    assert all(torch.equal(back[name].b_OR, adapter[name].b_OR) for name in adapter)
