"""What the optimiser's moments say of a module: how large gradients are, and how long the step that they imply is.

A step is measured in learning rates: the root mean square of M / √V over the numbers of a factor. AdamW's first step
from nothing is 1 for every number; a step of many gradients that agree is near 1, one of gradients that are noise is
short.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from fedloom.lora.pair import Adapter
from fedloom.training.moments import ROWS

_KEPT = re.compile(r"(.+)\.(a|b|a_RI|bt_RO)\.exp_avg_sq")
_TINY = 1e-300


@dataclass(frozen=True)
class FactorMoments:
    """A factor's moments: root mean square of its gradients, and of the implied step in learning rates, if known."""

    gradient: float
    step: float | None


Moments = Mapping[str, Mapping[str, FactorMoments]]
"""By module, then by factor, ``a`` or ``b``."""


def shared_moments(
    second: Mapping[str, Tensor],
    start: Adapter,
    before: Adapter | None,
    *,
    learning_rate: float,
    steps: float,
    scale: float,
) -> Moments:
    """Return the moments that clients share: rms gradient of the effective factors, and M as the last move implies.

    ``before`` is the start of the round before; None: not kept, so no step is known.
    """
    found: dict[str, dict[str, FactorMoments]] = {}
    for key, rows_R in second.items():
        if not key.endswith(ROWS):
            continue
        module, _, factor = key.removesuffix(ROWS).rpartition(".")
        step = None
        if before is not None and steps > 0.0:
            now, then = (one[module].a_RI if factor == "a" else one[module].b_OR for one in (start, before))
            move = float((now.double() - then.double()).square().mean().sqrt())
            step = move / (steps * learning_rate) / (scale if factor == "b" else 1.0)
        gradient = float(rows_R.double().mean().clamp_min(0.0).sqrt())
        found.setdefault(module, {})[factor] = FactorMoments(gradient, step)
    return found


def adamw_moments(states: Sequence[tuple[Mapping[str, Tensor], float]], betas: tuple[float, float]) -> Moments:
    """Return the moments of AdamW's own state, the server's or the mean over those of clients, bias-corrected.

    A state comes with the scale of its ``B``, by which a gradient of the effective ``B`` is smaller.
    """
    found: dict[str, dict[str, list[FactorMoments]]] = {}
    for state, scale in states:
        for key, square in state.items():
            if (match := _KEPT.fullmatch(key)) is None:
                continue
            stem = key.removesuffix("exp_avg_sq")
            steps = float(state[f"{stem}step"])
            first, second = (1.0 - beta**steps for beta in betas)
            v = square.double() / max(second, _TINY)
            m = state[f"{stem}exp_avg"].double() / max(first, _TINY)
            step = torch.where(v > 0.0, m / v.clamp_min(_TINY).sqrt(), torch.zeros_like(m))
            factor = match[2][0]
            size = scale if factor == "b" else 1.0
            one = FactorMoments(float(v.mean().sqrt()) / size, float(step.square().mean().sqrt()))
            found.setdefault(match[1], {}).setdefault(factor, []).append(one)
    return {module: {factor: _mean(ones) for factor, ones in own.items()} for module, own in found.items()}


def _mean(ones: Sequence[FactorMoments]) -> FactorMoments:
    steps = [one.step for one in ones if one.step is not None]
    return FactorMoments(fmean(one.gradient for one in ones), fmean(steps) if steps else None)
