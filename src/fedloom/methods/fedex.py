"""FedEx-LoRA: FedIT's mean of the factors, and beside it, in the side, what the product of the means misses.

    B ← Σ p_k B_k,   A ← Σ p_k A_k,   side ← side + (Σ p_k B_k A_k − B A)

The global product is the clients' exact mean every round. The residual's rank is (K + 1) r before it is compressed.

Source: FedEx-LoRA (arXiv 2410.09432), eq. 11–13. Deviations: the residual is kept in factored form beside the base
instead of being added to it (exact for 16-bit and quantised bases too), and compressed without loss; weights by work as
everywhere here, uniform in the paper (``method.weighting``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedloom.lora.algebra import compress, stack
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.sums import FactorSum
from fedloom.methods.zero_padding import ZeroPadding


@dataclass(frozen=True)
class FedEx(ZeroPadding):
    """The mean of the factors, with its residual in the side."""

    name: str = "fedex-lora"

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        """Average the factors and compress the residual."""
        mean = super().finish(state, sums)
        assert mean.start is not None
        residual = compress(stack([mean.ideal, mean.start.to(torch.float64)], [1.0, -1.0])).adapter
        return replace(mean, side=residual.to(sums.factors.dtype))
