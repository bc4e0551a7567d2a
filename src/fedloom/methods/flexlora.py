"""FlexLoRA: the clients' exact mean product, cut to the best of the largest rank; each client gets its top r_k.

    W ← Σ p_k B_k A_k = U Σ Vᵀ,   B ← U √Σ,   A ← √Σ Vᵀ,   client k starts from the first r_k slots

What a client of small rank does not receive it cannot send back: with clients that change nothing, singular value i
shrinks each round by the share of the weights whose rank is at least i, so tails fade at unequal ranks.

Source: FlexLoRA (arXiv 2402.11505), section 3. Deviations: the SVD is taken in factored form (two QRs and a small SVD
give the same factors as that of the dense matrix), and the singular values are spread over both factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedloom.lora.algebra import compress, pad_pair
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.sums import FactorSum
from fedloom.methods.zero_padding import ZeroPadding


@dataclass(frozen=True)
class FlexLoRA(ZeroPadding):
    """The best rank-R approximation of the mean product."""

    name: str = "flexlora"

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        """Cut the mean product to the largest rank; fewer singular values than that leave slots of zero."""
        rank, mean = self.cohort.max_rank, super().finish(state, sums)
        best = compress(mean.ideal, rank=rank).adapter.to(sums.factors.dtype)
        assert mean.start is not None
        return replace(mean, start=Adapter({name: pad_pair(best[name], own.rank) for name, own in mean.start.items()}))
