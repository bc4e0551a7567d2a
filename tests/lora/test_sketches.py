"""A sum of sketches is the sum of the products: exactly up to its rank, near the best beyond it, and bounded always."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from fedloom.lora.algebra import stack_pairs
from fedloom.lora.pair import Pair
from fedloom.lora.sketches import PairSketch, SketchSize
from fedloom.privacy.secure_sum.fixed_point import from_ring, to_ring


def pairs_of(seed: int, shape: tuple[int, int], ranks: tuple[int, ...], decay: float = 1.0) -> list[Pair]:
    generator, (num_out, num_in) = torch.Generator().manual_seed(seed), shape
    found = []
    for rank in ranks:
        b = 0.01 * torch.randn(num_out, rank, generator=generator) * decay ** torch.arange(rank)
        found.append(Pair(b, 0.05 * torch.randn(rank, num_in, generator=generator)))
    return found


def summed(sketch: PairSketch, pairs: list[Pair], weights: list[float]) -> dict[str, Tensor]:
    """Return the sum in fixed point, as a masked sum opens it."""
    total: dict[str, Tensor] = {}
    for pair, weight in zip(pairs, weights, strict=True):
        for part, numbers in sketch.of(pair, weight).items():
            rounded = torch.from_numpy(from_ring(to_ring(numbers.numpy(), len(pairs))))
            total[part] = total[part] + rounded if part in total else rounded
    assert {part: tuple(tensor.shape) for part, tensor in total.items()} == sketch.sizes()
    return total


@pytest.mark.parametrize(
    ("shape", "ranks", "is_dense"),
    [
        ((96, 64), (1, 4, 2), False),
        ((64, 200), (3, 3, 3, 3), False),
        ((200, 64), (8, 1, 2), False),
        ((40, 30), (8, 4, 2), True),
        ((5, 70), (8, 4, 8), True),
        ((70, 5), (1, 1, 1), True),
    ],
)
def test_the_sum_is_that_of_the_products_at_any_ranks_whoever_is_in_it(
    shape: tuple[int, int], ranks: tuple[int, ...], is_dense: bool
) -> None:
    for seed in range(10):
        pairs = pairs_of(seed, shape, ranks)
        sketch = PairSketch(shape, SketchSize(sum(ranks)), seed, ("a module",))
        assert sketch.is_dense is is_dense
        assert (sum(map(math.prod, sketch.sizes().values())) < math.prod(shape)) is not is_dense
        for gone in (None, 1):
            present = [k for k in range(len(ranks)) if k != gone]
            weights = [0.5 / (k + 1) for k in present]
            numbers = summed(sketch, [pairs[k] for k in present], weights)
            rank = min(sum(ranks[k] for k in present), *shape)
            found = sketch.pair(numbers, rank)
            wanted = stack_pairs([pairs[k].to(torch.float64) for k in present], weights).delta()
            assert found.rank == rank
            assert float((found.delta() - wanted).norm() / wanted.norm()) < 1e-8, "a float32 has 6e-8"


def test_beyond_its_rank_the_sum_is_as_near_as_the_source_says() -> None:
    shape, ranks, size = (120, 160), (12, 8, 8), SketchSize(10, is_whole=False)
    squares, best, rounds = 0.0, 0.0, 30
    for seed in range(rounds):
        pairs = pairs_of(seed, shape, ranks, decay=0.8)
        sketch = PairSketch(shape, size, seed, ("a module",))
        assert not sketch.is_dense
        numbers, exact = (
            summed(sketch, pairs, [1 / 3] * 3),
            stack_pairs([p.to(torch.float64) for p in pairs], [1 / 3] * 3),
        )
        wanted = exact.delta()
        sigma = torch.linalg.svdvals(wanted)
        squares += float((sketch.pair(numbers, size.columns).delta() - wanted).square().sum()) / rounds
        columns, rows = size.columns, size.rows
        best += (
            min(
                (1 + columns / (rows - columns - 1)) * (1 + r / (columns - r - 1)) * float(sigma[r:].square().sum())
                for r in range(columns - 1)
            )
            / rounds
        )
    assert 0.1 * best < squares < best


def test_every_client_adds_as_many_numbers_whatever_its_rank_and_a_weight_goes_into_them() -> None:
    sketch = PairSketch((64, 96), SketchSize(6), 1, ("a module",))
    for pair in pairs_of(3, (64, 96), (1, 5)):
        once, half = sketch.of(pair), sketch.of(pair, 0.5)
        assert (
            {part: tuple(tensor.shape) for part, tensor in once.items()}
            == sketch.sizes()
            == {"y": (64, 14), "z": (22, 96)}
        )
        assert all(torch.equal(tensor, 2.0 * half[part]) for part, tensor in once.items())


def test_draws_are_the_same_bits_everywhere_and_others_for_other_names() -> None:
    def drawn(seed: int, *name: str | int) -> str:
        sketch = PairSketch((60, 60), SketchSize(2), seed, name)
        numbers = sketch.of(Pair(torch.eye(60), torch.eye(60)))
        assert all(float(tensor.abs().max()) < 2.0 for tensor in numbers.values())
        assert all(0.9 < float(tensor.std()) < 1.4 for tensor in numbers.values())
        return hashlib.sha256(b"".join(numbers[part].contiguous().numpy().tobytes() for part in "yz")).hexdigest()

    assert drawn(1, 2, "a").startswith("19609c267e7371a1")
    assert len({drawn(1, 2, "a"), drawn(2, 2, "a"), drawn(1, 3, "a"), drawn(1, 2, "b")}) == 4


def test_numbers_of_no_product_give_no_large_sum() -> None:
    """A client that lies may send what no product gives, in directions that the rows of the sketch do not see."""
    sketch = PairSketch((80, 90), SketchSize(4), 1, ("a module",))
    psi = sketch.of(Pair(torch.eye(80), torch.eye(80, 90)))["z"][:, :80]
    blind = torch.linalg.svd(psi, full_matrices=True).Vh[sketch.size.rows :].T
    (pair,) = pairs_of(1, (80, 90), (2,))
    numbers = sketch.of(pair)
    numbers["y"] = numbers["y"] + 1e6 * blind[:, :12]
    found = sketch.pair(numbers, 4).delta()
    assert torch.isfinite(found).all()
    assert float(found.norm()) < 10.0 * float(pair.delta().norm())
    zero = {part: torch.zeros_like(tensor) for part, tensor in numbers.items()}
    assert float(sketch.pair(zero, 4).delta().norm()) == 0.0
