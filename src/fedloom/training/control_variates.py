"""SCAFFOLD: every step of a client is corrected by how its own moves differ from those of all clients.

With D_k how far client k's own steps carried it the last time that it took part, and D the mean over all clients:

    y ← y − AdamW(g)_i − w_i (D − D_k)       w_i = η_i / Σ η_i, over the steps of the round
    D_k ← D_k − D + (x − y)                  x: the start, y: the end of the round
    D ← D + |S|/N (Σ p_k (x − y_k) − D)      at the server, over the clients S of the round

Only D crosses, downwards: the server knows every x − y_k anyway. Σ w_i = 1, so D_k is what the client's own steps
came to.

Source: SCAFFOLD (arXiv 1910.06378), algorithm 1, option II, with c = D / Σ η. Deviations: what is corrected is the step
and not the gradient, which for SGD is the same and for AdamW, whose steps do not grow with the gradient, is the form
in which moves add up; the variates are those of the effective factors; clients are weighed by p_k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Variates = Mapping[str, Tensor]
"""``<module>.a`` (R, I) and ``<module>.b`` (O, R): how far a round carries the effective factors, downhill."""


def correction_of(mean: Variates, own: Variates) -> dict[str, Tensor]:
    """Return D − D_k; what is not there is zero, as before the first round."""
    return {key: mean.get(key, 0.0) - own.get(key, torch.zeros(())) for key in sorted({*mean, *own})}


def carried(start: Mapping[str, Tensor], end: Mapping[str, Tensor], correction: Variates) -> dict[str, Tensor]:
    """Return the next D_k: by how much a client's own steps carried it from its start, without the correction."""
    return {key: start[key] - end[key] - correction.get(key, 0.0) for key in end}


def mean_after(mean: Variates, moved: Variates, share: float) -> dict[str, Tensor]:
    """Return the next D, where ``share`` of all clients took part and moved by ``moved`` on average."""
    return {key: mean.get(key, torch.zeros_like(move)).lerp(move, share) for key, move in moved.items()}


def corrected_steps(
    correction: Variates, factors: Mapping[str, nn.Parameter], scale: float, rates: Sequence[float]
) -> Callable[[float], None]:
    """Return what applies a step's part of the correction, given the step's learning rate.

    ``factors`` hold a slot's raw ``a_RI`` and ``bt_RO`` that are trained; ``bt`` is ``bᵀ`` over ``scale``. ``rates``
    are those of all steps of the round.
    """
    whole = sum(rates)
    if not correction or whole == 0.0:
        return lambda rate: None
    raw = {}
    for name, factor in factors.items():
        module, _, kind = name.rpartition(".")
        found = correction.get(f"{module}.{kind[0]}")
        if found is not None:
            raw[name] = (found if kind[0] == "a" else found.T / scale).to(factor)

    @torch.no_grad()
    def correct(rate: float) -> None:
        for name, step in raw.items():
            factors[name].sub_(step, alpha=rate / whole)

    return correct
