"""The result's shape: rank, norm and singular values of every module of an adapter on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.lora.pair import Adapter

NOTHING = 1e-6
"""A singular value below this share of the largest is rounding."""


@dataclass(frozen=True)
class Spectrum:
    """One module: shape (out, in), rank as stored, singular values of ``B · A`` from the largest down."""

    module: str
    shape: tuple[int, int]
    rank: int
    singular_values: tuple[float, ...]

    @property
    def norm(self) -> float:
        """Frobenius norm of ``B · A``."""
        return math.hypot(*self.singular_values)

    @property
    def numerical_rank(self) -> int:
        """How many singular values are more than rounding."""
        largest = max(self.singular_values, default=0.0)
        return sum(sigma > NOTHING * largest for sigma in self.singular_values)

    @property
    def effective_rank(self) -> float:
        """``exp(−Σ p_i ln p_i)`` with ``p_i = σ_i / Σ σ``; 0 of nothing. Source: Roy and Vetterli, EUSIPCO 2007."""
        whole = sum(self.singular_values)
        shares = [sigma / whole for sigma in self.singular_values if sigma > 0.0] if whole > 0.0 else []
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """``Σ σ² / σ_1²``; 0 of nothing."""
        largest = max(self.singular_values, default=0.0)
        return sum((sigma / largest) ** 2 for sigma in self.singular_values) if largest > 0.0 else 0.0

    def rank_holding(self, share: float) -> int:
        """Return how many directions hold ``share`` of the energy Σ σ²."""
        wanted, held = share * sum(sigma * sigma for sigma in self.singular_values), 0.0
        for count, sigma in enumerate(self.singular_values, start=1):
            held += sigma * sigma
            if held >= wanted:
                return count
        return len(self.singular_values)


def spectra_of(adapter_folder: Path) -> list[Spectrum]:
    """Return the spectrum of every module of a PEFT folder; loads torch.

    Raises:
        AdapterError: the folder cannot be read.
    """
    from fedloom.lora.peft_files import load_peft

    return spectra_in(load_peft(adapter_folder))


def spectra_in(adapter: Adapter) -> list[Spectrum]:
    """Return the spectrum of every module of an adapter, from two QRs and one small SVD a module.

    Raises:
        AdapterError: a number is not finite.
    """
    from fedloom.lora.algebra import compress

    values = compress(adapter).spectrum
    return [Spectrum(name, pair.shape, pair.rank, tuple(values[name].tolist())) for name, pair in adapter.items()]


def mean_spectrum(spectra: Sequence[Spectrum]) -> list[float]:
    """Return the root mean square over modules of the i-th singular value, divided by that of the first."""
    longest = max((len(one.singular_values) for one in spectra), default=0)
    energy = [
        sum(one.singular_values[i] ** 2 for one in spectra if i < len(one.singular_values)) for i in range(longest)
    ]
    return [math.sqrt(value / energy[0]) for value in energy] if energy and energy[0] > 0 else []
