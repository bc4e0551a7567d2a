"""Weave: every client trains its first slots of one global adapter and carries the rest; the mean is exact.

    client k:  W_k = side + B_k A_k + B⁺ A⁺   (its first r_k slots, trained; the others B⁺ A⁺ as they are)
    server:    B ← Σ p_k [B_k, B⁺],   A ← Σ p_k [A_k; A⁺],   side ← side + (Σ p_k W_k − B A)

So the global model is ``Σ p_k W_k`` at any ranks and with any clients absent, and a client that changes nothing pulls
nothing towards zero, as padding would. What the mean of the factors misses is compressed within
``method.broadcast_max_bytes`` and what that leaves out is fed back. With ``server.step = adamw`` clients send gradients
and nothing is missed (:class:`fedloom.methods.around.SynchronisedSteps`).

Source: ours. FedEx-LoRA (arXiv 2410.09432) is the case of equal ranks without a limit of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fedloom.lora.algebra import stack_pairs
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.fedex import FedEx
from fedloom.methods.state import ServerState, Update
from fedloom.methods.strategy import Weighting
from fedloom.methods.sums import FactorSum


@dataclass(frozen=True)
class Weave(FedEx):
    """The exact mean of clients that hold the whole global adapter and train their first slots of it."""

    name: str = "weave"

    def start_for(self, state: ServerState, client: int) -> Adapter:
        """Return the whole global adapter, whatever the client's rank."""
        assert state.start is not None
        return state.start

    def empty(self, state: ServerState) -> FactorSum:
        """Return empty sums of completed factors and of products."""
        assert state.start is not None
        return CompletedSum(self.cohort.max_rank, self.weighting, partial(super().start_for, state), state.start)


class CompletedSum(FactorSum):
    """The sums of a mean of factors, of clients' slots completed by those that they carried.

    Slots that are carried are the same at all clients. Of them only the weight is summed, so that the rank of the sum
    of products grows with the clients' own slots alone.
    """

    def __init__(self, rank: int, weighting: Weighting, trained_by: Callable[[int], Adapter], start: Adapter) -> None:
        """``trained_by`` are a client's own slots of the ``start``."""
        super().__init__(rank, weighting, trained_by)
        self._start = start
        self._carried = {name: torch.zeros(pair.rank, dtype=torch.float64) for name, pair in start.items()}

    def add(self, update: Update) -> None:
        """Take one update in."""
        super().add(update)
        for name, pair in update.adapter.items():
            self._carried[name][pair.rank :] += self.weights[update.client]

    def _whole(self, adapter: Adapter) -> Adapter:
        return completed(adapter, self._start)

    def merge(self, other: FactorSum) -> None:
        """Take another sum in."""
        super().merge(other)
        assert isinstance(other, CompletedSum)
        for name, weights in other._carried.items():
            self._carried[name] += weights

    def mean_product(self) -> Adapter:
        """Return ``Σ p_k (B_k A_k + B⁺ A⁺)``, float64."""
        whole, own = sum(self.weights.values()), self.products.mean()
        pairs = {}
        for name, pair in own.items():
            start, shares = self._start[name].to(torch.float64), self._carried[name] / whole
            carried = shares > 0.0
            parts = [pair, Pair(start.b_OR[:, carried] * shares[carried], start.a_RI[carried])]
            pairs[name] = stack_pairs(parts, [1.0, 1.0])
        return Adapter(pairs)


def completed(adapter: Adapter, start: Adapter) -> Adapter:
    """Return an adapter with the slots of ``start`` beyond its own."""
    pairs = {}
    for name, pair in adapter.items():
        whole, rank = start[name], pair.rank
        b_OR = torch.cat([pair.b_OR, whole.b_OR[:, rank:]], dim=1)
        pairs[name] = Pair(b_OR, torch.cat([pair.a_RI, whole.a_RI[rank:]], dim=0))
    return Adapter(pairs)
