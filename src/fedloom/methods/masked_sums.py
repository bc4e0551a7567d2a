"""Aggregate from a sum alone: what each client adds to it, and what the server makes of it without seeing a part.

    client k sends   x_k = q_k · [B_k, A_k], padded with zeros to the largest rank,   q_k = its share of the cohort
    the server takes Σ x_k / Σ q_k,   both over those who stayed

It is the weighted mean of the factors, as without masks; shares are known before the round, so they tell nothing new.
Where whole clients are hidden, a client clips its change itself, and the server adds the noise to the sum, or each
client its share of it. Where products are summed, a client sends a sketch of its own, of a size that is the same for
all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedloom.lora.pair import Adapter, rank_in
from fedloom.lora.sketches import PairSketch, SketchSize
from fedloom.methods.around import Around
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.strategy import Cohort, Strategy, normalised

Numbers = Mapping[str, Tensor]
"""Numbers by name, module and what of it, in float64."""
Sizes = dict[str, tuple[int, int]]
"""The shape of every tensor of a summand, the same for all clients."""


class Rule(Protocol):
    """A method that needs nothing but a sum over its clients."""

    @property
    def agreed(self) -> tuple[float, ...]:
        """Numbers that all in a sum must have been told alike, beside its terms."""
        return ()

    def sizes(self) -> Sizes:
        """Return the shapes of what a client adds."""
        ...

    def summand(self, round: int, start: Adapter, trained: Adapter, share: float) -> Numbers:
        """Return what a client adds to a round's sum: it began with ``start`` and ended with ``trained``.

        A start that was drawn afresh, of which the product is zero, may be given as an empty adapter.
        """
        ...

    def noise_share(self, start: Adapter, round: int, client: int) -> Numbers:
        """Return the noise that a client adds to its summand, by the same names; nothing where it adds none."""
        return {}

    def of_sum(self, state: ServerState, numbers: Numbers, shares: Mapping[int, float]) -> Aggregate:
        """Return what a sum amounts to; ``shares`` are of those who are in it."""
        ...


@dataclass(frozen=True)
class MeanOfFactors(Rule):
    """The weighted mean of the factors that cross, of a method whose next start it is."""

    method: Strategy

    def sizes(self) -> Sizes:
        """Return the shapes of the factors that cross, at the largest rank."""
        return factor_sizes(self.method)

    def summand(self, round: int, start: Adapter, trained: Adapter, share: float) -> Numbers:
        """Return the factors times the share, padded to the largest rank."""
        sent = self.method.client.work(1).sends
        found = {key: share * tensor.double() for key, tensor in trained.as_tensors(sent).items()}
        return {key: _padded(tensor, key, rank) for key, tensor in found.items() for rank in [self._rank_of(key)]}

    def of_sum(self, state: ServerState, numbers: Numbers, shares: Mapping[int, float]) -> Aggregate:
        """Return the mean as the next start; how far the clients' products are from its product nobody knows."""
        assert state.start is not None
        dtype, total = next(iter(state.start.values())).b_OR.dtype, sum(shares.values())
        start = state.start.with_factors({key: (tensor / total).to(dtype) for key, tensor in numbers.items()})
        return Aggregate(start, Adapter(), Adapter(), 0.0, normalised(shares))

    def _rank_of(self, key: str) -> int:
        cohort = self.method.cohort
        return rank_in(cohort.shapes[key[:-2]], cohort.max_rank)


@dataclass(frozen=True)
class SumOfProducts(Rule):
    """The weighted sum of the clients' products, which joins the side as one update: FLoRA's, from sketches.

    Its rank is that of the stack of those who stayed, or that of the sketches where it is lower.
    """

    cohort: Cohort
    size: SketchSize

    @property
    def agreed(self) -> tuple[float, ...]:
        """What sketches are drawn by: a client that drew others could be told apart from the rest of a sum."""
        seed = self.cohort.seed
        return (float(seed >> 32), float(seed & 0xFFFFFFFF), float(self.size.rank), float(self.size.is_whole))

    def sizes(self) -> Sizes:
        """Return the shapes of a sketch of every module."""
        sketches = self._sketches(0).items()  # of any round
        return {f"{name}.{part}": shape for name, one in sketches for part, shape in one.sizes().items()}

    def summand(self, round: int, start: Adapter, trained: Adapter, share: float) -> Numbers:
        """Return the sketches of the products times the share."""
        sketches = self._sketches(round).items()
        return {f"{name}.{part}": t for name, one in sketches for part, t in one.of(trained[name], share).items()}

    def of_sum(self, state: ServerState, numbers: Numbers, shares: Mapping[int, float]) -> Aggregate:
        """Return the mean product as what joins the side; how far the clients' products are apart nobody knows."""
        total, pairs = sum(shares.values()), {}
        for name, sketch in self._sketches(state.round + 1).items():
            ranks = sum(rank_in(sketch.shape, self.cohort.rank_of(client)) for client in shares)
            parts = {part: numbers[f"{name}.{part}"] / total for part in sketch.sizes()}
            pairs[name] = sketch.pair(parts, rank_in(sketch.shape, min(ranks, self.size.rank))).to(torch.float32)
        return Aggregate(None, Adapter(pairs), Adapter(), 0.0, normalised(shares))

    def _sketches(self, round: int) -> dict[str, PairSketch]:
        shapes, seed = sorted(self.cohort.shapes.items()), self.cohort.seed
        return {name: PairSketch(shape, self.size, seed, (round, name)) for name, shape in shapes}


@dataclass(frozen=True)
class MaskedSums(Around):
    """A method whose server sees sums alone; ``rule`` says of what."""

    rule: Rule

    def sizes(self) -> Sizes:
        """Return the shape of every tensor of a summand, the same for all clients."""
        return self.rule.sizes()

    @property
    def num_numbers(self) -> int:
        """Numbers of a summand."""
        return sum(num_rows * num_columns for num_rows, num_columns in self.sizes().values())


def factor_sizes(method: Strategy) -> Sizes:
    """Return the shapes of the factors that a method's clients send, at the largest rank."""
    cohort, sends = method.cohort, method.client.work(1).sends
    found: Sizes = {}
    for name, (num_out, num_in) in sorted(cohort.shapes.items()):
        rank = rank_in((num_out, num_in), cohort.max_rank)
        both = {"a": (rank, num_in), "b": (num_out, rank)}
        found |= {f"{name}.{factor}": both[factor] for factor in sorted(sends)}
    return found


def _padded(tensor: Tensor, key: str, rank: int) -> Tensor:
    """Return a factor with zeros in the slots up to a rank."""
    missing = rank - (tensor.shape[1] if key.endswith(".b") else tensor.shape[0])
    return torch.nn.functional.pad(tensor, (0, missing) if key.endswith(".b") else (0, 0, 0, missing))
