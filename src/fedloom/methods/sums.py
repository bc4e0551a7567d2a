"""Sums over clients that take one update at a time and merge, in float64, so that order and grouping do not show.

Memory is bounded by the model, not by the number of clients: factors are summed in place, and a sum of products is
compressed losslessly whenever its rank passes what a matrix of that shape can have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedloom.lora.algebra import compress_pair, distance, pad_pair, stack_pairs
from fedloom.lora.pair import Adapter, Pair, rank_in
from fedloom.methods.state import Update
from fedloom.methods.strategy import Weighting, normalised, weigh


class RunningFactors:
    """``Σ w_k b_k`` and ``Σ w_k a_k``, shorter ones counted as padded with zeros up to ``rank``."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._sums: dict[str, Pair] = {}
        self._weight = 0.0
        self._dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which clients sent their factors, and of the mean."""
        return self._dtype

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add one client's factors."""
        for name, pair in adapter.items():
            self._make_room(name, pair.shape, pair.rank)
            self._dtype = pair.b_OR.dtype
            self._sums[name].b_OR[:, : pair.rank] += weight * pair.b_OR.double()
            self._sums[name].a_RI[: pair.rank] += weight * pair.a_RI.double()
        self._weight += weight

    def merge(self, other: RunningFactors) -> None:
        """Add another sum of factors."""
        for name, theirs in other._sums.items():
            self._make_room(name, theirs.shape, theirs.rank)
            self._sums[name].b_OR[:, : theirs.rank] += theirs.b_OR
            self._sums[name].a_RI[: theirs.rank] += theirs.a_RI
        self._dtype = other._dtype if other._sums else self._dtype
        self._weight += other._weight

    def _make_room(self, name: str, shape: tuple[int, int], rank: int) -> None:
        """Have slots for the largest rank that a module can hold, and for an adapter made elsewhere that has more."""
        held = self._sums.get(name) or Pair(
            *(torch.zeros(s, dtype=torch.float64) for s in ((shape[0], 0), (0, shape[1])))
        )
        wanted = max(held.rank, rank, rank_in(shape, self._rank))
        if name not in self._sums or held.rank < wanted:
            self._sums[name] = pad_pair(held, wanted)

    def mean(self) -> Adapter:
        """Return the weighted mean of the factors."""
        pairs = {n: Pair(s.b_OR / self._weight, s.a_RI / self._weight) for n, s in self._sums.items()}
        return Adapter(pairs).to(self._dtype)


class RunningSum:
    """``Σ w_k b_k a_k`` as factors whose rank stays below the two sides of the matrix together."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Pair]] = {}
        self._weight = 0.0

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add one client's products."""
        for name, pair in adapter.items():
            self._append(name, [pair.to(torch.float64).scaled(weight)])
        self._weight += weight

    def merge(self, other: RunningSum) -> None:
        """Add another sum of products."""
        for name, parts in other._parts.items():
            self._append(name, parts)
        self._weight += other._weight

    def mean(self) -> Adapter:
        """Return the weighted mean of the products, float64."""
        return Adapter({name: _joined(parts).scaled(1.0 / self._weight) for name, parts in self._parts.items()})

    def _append(self, name: str, more: list[Pair]) -> None:
        parts = [*self._parts.get(name, []), *more]
        is_large = sum(part.rank for part in parts) > sum(parts[0].shape)
        self._parts[name] = [compress_pair(_joined(parts)).pair] if is_large else parts


class FactorSum:
    """What a mean of factors needs: padded factors, products, squared changes and weights, one update at a time."""

    def __init__(self, rank: int, weighting: Weighting, start_for: Callable[[int], Adapter]) -> None:
        self._weighting, self._start_for = weighting, start_for
        self.factors, self.products = RunningFactors(rank), RunningSum()
        self.weights: dict[int, float] = {}
        self._squares = 0.0

    def add(self, update: Update) -> None:
        """Take one update in."""
        weight = self.weights[update.client] = weigh(update, self._weighting)
        self.factors.add(self._whole(update.adapter), weight)
        self.products.add(update.adapter, weight)
        self._squares += weight * distance(update.adapter, self._start_for(update.client)) ** 2

    def merge(self, other: FactorSum) -> None:
        """Take another sum in."""
        self.factors.merge(other.factors)
        self.products.merge(other.products)
        self.weights |= other.weights
        self._squares += other._squares

    def _whole(self, adapter: Adapter) -> Adapter:
        """Return the factors whose mean is taken, by default those that the client sent."""
        return adapter

    def mean_product(self) -> Adapter:
        """Return ``Σ p_k B_k A_k``, float64."""
        return self.products.mean()

    @property
    def shares(self) -> dict[int, float]:
        """Each client's weight, summing to one."""
        return normalised(self.weights)

    @property
    def mean_squared_norm(self) -> float:
        """``Σ p_k ‖change of client k‖²``."""
        return self._squares / sum(self.weights.values())


def _joined(parts: list[Pair]) -> Pair:
    return stack_pairs(parts, [1.0] * len(parts))
