"""Sums over clients that take one update at a time, in float64, so that arrival order does not show.

Memory is bounded by the model, not by the number of clients: factors are summed in place, and a sum of products is
compressed losslessly whenever its rank passes what a matrix of that shape can have.
"""

from __future__ import annotations

import torch

from fedloom.lora.algebra import compress_pair, stack_pairs
from fedloom.lora.pair import Adapter, Pair


class RunningFactors:
    """``Σ w_k b_k`` and ``Σ w_k a_k``, shorter ones counted as padded with zeros up to ``rank``."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._sums: dict[str, Pair] = {}
        self._weight = 0.0
        self._dtype = torch.float32

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add one client's factors."""
        for name, pair in adapter.items():
            if name not in self._sums:
                (num_out, num_in), rank = pair.shape, self._rank
                zeros = [torch.zeros(size, dtype=torch.float64) for size in ((num_out, rank), (rank, num_in))]
                self._sums[name] = Pair(*zeros)
            self._dtype = pair.b_OR.dtype
            self._sums[name].b_OR[:, : pair.rank] += weight * pair.b_OR.double()
            self._sums[name].a_RI[: pair.rank] += weight * pair.a_RI.double()
        self._weight += weight

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
            parts = self._parts.setdefault(name, [])
            parts.append(pair.to(torch.float64).scaled(weight))
            if sum(part.rank for part in parts) > sum(pair.shape):
                self._parts[name] = [compress_pair(_joined(parts)).pair]
        self._weight += weight

    def mean(self) -> Adapter:
        """Return the weighted mean of the products, float64."""
        return Adapter({name: _joined(parts).scaled(1.0 / self._weight) for name, parts in self._parts.items()})


def _joined(parts: list[Pair]) -> Pair:
    return stack_pairs(parts, [1.0] * len(parts))
