"""Zero-padding: factors of different ranks are padded to the largest and averaged; each client gets its slice back.

    B ← Σ p_k pad(s_k B_k),   A ← Σ p_k pad(A_k),   client k starts from the first r_k slots

With equal ranks this is FedIT. With ``weighting = norm``, p_k ∝ ‖s_k B_k A_k‖ (HetLoRA's sparsity-weighted
aggregation); HetLoRA's self-pruning of ranks is not part of it.

Source: HetLoRA (arXiv 2401.06432), sections 3.2–3.3; the baseline of FLoRA (arXiv 2409.05976), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from fedloom.lora.algebra import truncate
from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.strategy import Cohort, Strategy, Weighting
from fedloom.methods.sums import FactorSum


@dataclass(frozen=True)
class ZeroPadding(Strategy):
    """The plain mean of zero-padded factors, weighted by rows, tokens, equally or by norm."""

    cohort: Cohort
    weighting: Weighting = Weighting.ROWS
    name: str = "zero-padding"

    @property
    def drawn(self) -> Draw:
        """The draw of the first global adapter."""
        return Draw(("global",), self.cohort.max_rank)

    def initial(self) -> ServerState:
        """Start from one fresh adapter of the largest rank."""
        cohort = self.cohort
        return ServerState(start=self.drawn.adapter(cohort.shapes, cohort.max_rank, cohort.seed))

    def start_for(self, state: ServerState, client: int) -> Adapter:
        """Return the first r_k slots of the global adapter."""
        assert state.start is not None
        return truncate(state.start, self.cohort.rank_of(client))

    def empty(self, state: ServerState) -> FactorSum:
        """Return empty sums of padded factors and of products."""
        return FactorSum(self.cohort.max_rank, self.weighting, partial(self.start_for, state))

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        """Average the padded factors that the clients sent; a factor that does not cross stays as it is."""
        sent, start = self.client.work(state.round + 1).sends, sums.factors.mean()
        if sent != BOTH:
            assert state.start is not None
            start = state.start.with_factors(start.as_tensors(sent))
        return Aggregate(start, Adapter(), sums.mean_product(), sums.mean_squared_norm, sums.shares)


def fedit(cohort: Cohort, weighting: Weighting = Weighting.ROWS) -> ZeroPadding:
    """Return FedIT: FedAvg over the factors of adapters of one rank.

        B ← Σ p_k s B_k,   A ← Σ p_k A_k,   p_k = n_k / Σ n

    The product of the means misses the mean of the products by the weighted covariance of the factors, which every
    round reports as its aggregation noise. Source: FedIT (arXiv 2305.05644), Algorithm 1.
    """
    return replace(ZeroPadding(cohort, weighting), name="fedit")
