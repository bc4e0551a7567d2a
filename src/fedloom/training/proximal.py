"""FedProx: a client pays for how far its product has moved from the one that it started from.

    loss_k + μ/2 ‖s B A − s B₀ A₀‖²_F,  over all modules

The gradient comes from matrices of rank × rank alone, and vanishes exactly at the start:

    ∂/∂B = μ s² ((B − B₀) A Aᵀ + B₀ (A − A₀) Aᵀ)        ∂/∂A = μ s² (Bᵀ B (A − A₀) + Bᵀ (B − B₀) A₀)

Source: FedProx (arXiv 1812.06127), eq. 2. Deviation: the distance is that of the model's weights, i.e. of the products,
and not of the factors, so it does not depend on how a product is factored. Where every round starts from B₀ = 0 beside
a side adapter, the weights to stay near are those of base and side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn


def pull_to_start(
    weight: float, factors: Mapping[str, nn.Parameter], scale: float, trained: Collection[str]
) -> Callable[[], None]:
    """Return what adds the term's gradient, μ = ``weight``, to the gradients of the factors that are trained.

    ``factors`` hold a slot's raw ``a_RI`` and ``bt_RO``, named by module; what they hold now is the start.
    """
    if weight == 0.0:
        return lambda: None
    start = {name: factor.detach().clone() for name, factor in factors.items()}
    modules = [name.removesuffix(".a_RI") for name in factors if name.endswith(".a_RI")]
    strength = weight * scale**2

    @torch.no_grad()
    def pull() -> None:
        for module in modules:
            of_a, of_b = f"{module}.a_RI", f"{module}.bt_RO"
            a_RI, bt_RO, a0_RI, bt0_RO = factors[of_a], factors[of_b], start[of_a], start[of_b]
            moved_RI, moved_RO = a_RI - a0_RI, bt_RO - bt0_RO
            if of_b in trained:
                pulled_RO = (a_RI @ a_RI.T) @ moved_RO + (a_RI @ moved_RI.T) @ bt0_RO
                factors[of_b].grad.add_(pulled_RO, alpha=strength)  # type: ignore[union-attr]
            if of_a in trained:
                pulled_RI = (bt_RO @ bt_RO.T) @ moved_RI + (bt_RO @ moved_RO.T) @ a0_RI
                factors[of_a].grad.add_(pulled_RI, alpha=strength)  # type: ignore[union-attr]

    return pull
