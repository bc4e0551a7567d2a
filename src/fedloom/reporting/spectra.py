"""The result's shape: rank, norm and singular values of every module of an adapter on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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
    from fedloom.lora.algebra import compress
    from fedloom.lora.peft_files import load_peft

    adapter = load_peft(adapter_folder)
    values = compress(adapter).spectrum
    return [Spectrum(name, pair.shape, pair.rank, tuple(values[name].tolist())) for name, pair in adapter.items()]


def mean_spectrum(spectra: Sequence[Spectrum]) -> list[float]:
    """Return the root mean square over modules of the i-th singular value, divided by that of the first."""
    longest = max((len(one.singular_values) for one in spectra), default=0)
    energy = [
        sum(one.singular_values[i] ** 2 for one in spectra if i < len(one.singular_values)) for i in range(longest)
    ]
    return [math.sqrt(value / energy[0]) for value in energy] if energy and energy[0] > 0 else []
