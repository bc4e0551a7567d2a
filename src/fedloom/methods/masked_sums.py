"""Aggregate from a sum alone: what each client adds to it, and what the server makes of it without seeing a part.

    client k sends   x_k = q_k · [B_k, A_k], padded with zeros to the largest rank,   q_k = its share of the cohort
    the server takes Σ x_k / Σ q_k,   both over those who stayed

It is the weighted mean of the factors, as without masks; shares are known before the round, so they tell nothing new.
Where whole clients are hidden, a client clips its change itself, and the server adds the noise to the sum, or each
client its share of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedloom.lora.pair import Adapter, rank_in
from fedloom.methods.around import Around
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.strategy import Strategy, normalised

Numbers = Mapping[str, Tensor]
"""Numbers by name as in ``Adapter.as_tensors``, in float64."""


class Rule(Protocol):
    """A method that needs nothing but a sum over its clients."""

    @property
    def agreed(self) -> tuple[float, ...]:
        """Numbers that all in a sum must have been told alike."""
        ...

    def summand(self, start: Adapter, trained: Adapter, share: float) -> Numbers:
        """Return what a client adds to the sum: it began with ``start`` and ended with ``trained``."""
        ...

    def noise_share(self, start: Adapter, round: int, client: int) -> Numbers:
        """Return the noise that a client adds to its summand, by the same names; nothing where it adds none."""
        ...

    def of_sum(self, state: ServerState, numbers: Numbers, shares: Mapping[int, float]) -> Aggregate:
        """Return what a sum amounts to; ``shares`` are of those who are in it."""
        ...


@dataclass(frozen=True)
class MeanOfFactors:
    """The weighted mean of the factors that cross, of a method whose next start it is."""

    method: Strategy

    @property
    def agreed(self) -> tuple[float, ...]:
        """Nothing beside the terms of the sum."""
        return ()

    def summand(self, start: Adapter, trained: Adapter, share: float) -> Numbers:
        """Return the factors times the share, padded to the largest rank."""
        sent = self.method.client.work(1).sends
        found = {key: share * tensor.double() for key, tensor in trained.as_tensors(sent).items()}
        return {key: _padded(tensor, key, rank) for key, tensor in found.items() for rank in [self._rank_of(key)]}

    def noise_share(self, start: Adapter, round: int, client: int) -> Numbers:
        """Add nothing."""
        return {}

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
class MaskedSums(Around):
    """A method whose server sees sums alone; ``rule`` says of what."""

    rule: Rule

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the shape of every tensor of a summand, the same for all clients."""
        cohort, sends = self.cohort, self.client.work(1).sends
        found: dict[str, tuple[int, int]] = {}
        for name, (num_out, num_in) in sorted(cohort.shapes.items()):
            rank = rank_in((num_out, num_in), cohort.max_rank)
            both = {"a": (rank, num_in), "b": (num_out, rank)}
            found |= {f"{name}.{factor}": both[factor] for factor in sorted(sends)}
        return found

    @property
    def num_numbers(self) -> int:
        """Numbers of a summand."""
        return sum(num_rows * num_columns for num_rows, num_columns in self.sizes().values())


def _padded(tensor: Tensor, key: str, rank: int) -> Tensor:
    """Return a factor with zeros in the slots up to a rank."""
    missing = rank - (tensor.shape[1] if key.endswith(".b") else tensor.shape[0])
    return torch.nn.functional.pad(tensor, (0, missing) if key.endswith(".b") else (0, 0, 0, missing))
