"""Carry: the exact mean of the clients' weights at any ranks, and slots that follow the spectrum of the whole.

    server      side + start = U Σ Vᵀ                       all that training has added, in factors
    slots       B = U Σ / c,   A = c Vᵀ,   c² = 1/3         the first R: the start; what is left is the side
    client k    W_k = side + B_k A_k + B⁺ A⁺                trains its first r_k slots; B⁺ A⁺ are the others
    server      side + start ← Σ p_k W_k                    then U Σ Vᵀ is taken anew

``Σ p_k W_k = side + Σ p_k B_k A_k + U diag(1 − c_j) Σ Vᵀ``, where c_j is the share of the weights whose rank is above
slot j: it is the clients' mean whatever their ranks and whoever is away, and clients that change nothing change
nothing. Every client trains the strongest directions that its rank allows. A has the length of a random A, so that a
slot that is not in use (B zero, A random) moves as one that is. What the first R directions leave out joins the side
within ``method.broadcast_max_bytes``; the rest waits, is part of the next decomposition, and so is fed back.

Source: ours. FlexLoRA (arXiv 2402.11505) takes the same slots and loses what clients of small rank do not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedloom.lora.algebra import compress, compress_pair, stack, united
from fedloom.lora.initial import A_ROW_NORM
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.sums import FactorSum
from fedloom.methods.weave import Weave


@dataclass(frozen=True)
class Carry(Weave):
    """Weave's exact mean, of which clients continue from the leading directions."""

    name: str = "carry"

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        """Decompose the mean with the side; its leading directions are the next start."""
        assert state.start is not None
        mean = sums.mean_product()
        whole = united([mean, state.side.to(torch.float64), state.residual.to(torch.float64)])
        slots = Adapter({name: leading(whole[name], held) for name, held in state.start.items()})
        start = slots.to(sums.factors.dtype)
        missing = compress(stack([mean, start.to(torch.float64)], [1.0, -1.0])).adapter
        return Aggregate(start, missing.to(sums.factors.dtype), mean, sums.mean_squared_norm, sums.shares)


def leading(whole: Pair, held: Pair) -> Pair:
    """Return the first directions of a product in as many slots as ``held`` has.

    Slots that the product does not fill add nothing, and have the A of the same slots of ``held``: at first that is the
    random draw, or the start from the gradient.
    """
    found = compress_pair(whole, rank=held.rank).pair
    root_R = found.b_OR.norm(dim=0)
    b_OR, a_RI = found.b_OR * (root_R / A_ROW_NORM), found.a_RI / root_R[:, None] * A_ROW_NORM
    unused_RI = held.a_RI[found.rank :].to(a_RI)
    return Pair(torch.nn.functional.pad(b_OR, (0, len(unused_RI))), torch.cat([a_RI, unused_RI]))
