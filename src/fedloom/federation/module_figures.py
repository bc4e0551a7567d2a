"""What a round did, module by module: change, what the mean of factors missed, and how far the clients agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedloom.federation.agreement import Agreement, Agreements
from fedloom.lora.algebra import distances, inners
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Aggregate

DIGITS = 6
"""Significant digits that are kept of a module's figures: sums of clients in another order differ beyond."""


@dataclass(frozen=True)
class ModuleFigures:
    """One module's figures of a round; None where there is no such thing.

    Attributes:
        change_norm: norm of the round's change of the global product.
        aggregation_noise: ‖applied − Σ p_k B_k A_k‖ / ‖Σ p_k B_k A_k‖.
        agreement, cosine, client_norm: see :mod:`fedloom.federation.agreement`.
    """

    module: str
    change_norm: float
    aggregation_noise: float | None
    agreement: float | None
    cosine: float | None
    client_norm: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, rounded."""
        return {key: value if isinstance(value, str) else rounded(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class RoundFigures:
    """A round's figures, in all and by module."""

    aggregation_noise: float | None
    change_norm: float
    agreement: Agreement | None
    modules: tuple[ModuleFigures, ...]


@dataclass(frozen=True)
class Noise:
    """By module ``‖applied − Σ p_k s_k B_k A_k‖`` and ``‖Σ p_k s_k B_k A_k‖²``; empty where nothing is aggregated."""

    off: Mapping[str, float]
    squares: Mapping[str, float]

    @classmethod
    def of(cls, applied: Adapter, ideal: Adapter) -> Noise:
        """Measure what was applied against the mean product."""
        return cls(distances(applied.to(torch.float64), ideal), inners(ideal, ideal)) if ideal else cls({}, {})

    @property
    def in_all(self) -> float | None:
        """The noise relative to the mean, over all modules."""
        return _share(math.hypot(*self.off.values()), sum(self.squares.values())) if self.squares else None

    def in_module(self, name: str) -> float | None:
        """Return the noise relative to the mean, in one module."""
        return _share(self.off[name], self.squares[name]) if name in self.off else None


def _share(off: float, square: float) -> float:
    whole = math.sqrt(max(square, 0.0))
    return off / whole if whole > 0.0 else 0.0


def round_figures(aggregate: Aggregate, applied: Adapter, start: Adapter | None, seen: Agreements) -> RoundFigures:
    """Return the figures of a round that began with ``start``; ``applied`` is what clients see of the aggregate."""
    change, ideal = aggregate.change(start), aggregate.ideal
    noise, changes = Noise.of(applied, ideal), inners(change, change)
    found, in_all = seen.by_module(ideal, start, noise.squares)
    modules = tuple(
        ModuleFigures(name, math.sqrt(max(square, 0.0)), noise.in_module(name), *_parts(found.get(name)))
        for name, square in changes.items()
    )
    return RoundFigures(noise.in_all, math.sqrt(max(sum(changes.values()), 0.0)), in_all, modules)


def _parts(one: Agreement | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if one is None else (one.ratio, one.cosine, one.client_norm)


def rounded(value: float | None) -> float | None:
    """Return a figure with the digits that are kept."""
    return None if value is None else float(f"{value:.{DIGITS}g}")
