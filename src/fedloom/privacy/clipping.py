"""Clipping and noise: the sum over units that no single unit moves by more than the clip, and the noise that hides one.

    Σ_u g_u · min(1, C / ‖g_u‖)  +  N(0, (z C)² I),   ‖g_u‖² = the sum over all factors of all modules

Removing a unit moves the sum by at most C in norm, so the sum is a Gaussian mechanism of noise multiplier z.

Letters: U units. Source: Abadi et al., Deep Learning with Differential Privacy (2016), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedloom.privacy.draws import Draws


def add_clipped(sums: Sequence[Tensor], parts: Sequence[Tensor], clip: float) -> None:
    """Add to each factor's sum the clipped gradients of units: ``parts`` are (U, ...), a first axis before the sum's.

    Units are added one by one in their order, so that it does not matter how they were cut into passes. A unit whose
    gradient is not finite adds nothing.
    """
    squares_U = sum(part.double().flatten(1).square().sum(1) for part in parts)
    assert isinstance(squares_U, Tensor)
    factors_U = (clip / squares_U.sqrt()).clamp(max=1.0)
    finite_U = torch.isfinite(squares_U)
    for unit, (factor, is_finite) in enumerate(zip(factors_U, finite_U.tolist(), strict=True)):
        if is_finite:
            for whole, part in zip(sums, parts, strict=True):
                whole += part[unit] * factor.to(part.dtype)


def add_noise(sums: Sequence[Tensor], draws: Draws, deviation: float) -> None:
    """Add independent N(0, deviation²) to every number of every sum, from one draw after another."""
    if deviation == 0.0:
        return
    for whole in sums:
        noise = torch.from_numpy(draws.normals(whole.numel())).view(whole.shape)
        whole.add_(noise.to(whole), alpha=deviation)
