"""Start from the gradient: before the first round clients sketch the gradient of the weights, and A is made of it.

    client k    S_k = Ωᵀ G_k                  G_k: of the loss of four rows with respect to a weight, at the base
    server      Σ p_k S_k = U Σ Vᵀ            A = c · the first r rows of Vᵀ,   B = 0,   c² = 1/3

So A spans the directions of a module's input along which the clients' mean gradient is largest, and the scale of its
rows is that of a random A. Ω has r + 8 columns, drawn from the run's seed; ``Ωᵀ G`` is the gradient with respect to A
where B is Ω and A is zero, so no matrix as large as the weight is formed or sent. The sketch of a sum is the sum of the
sketches. A client of rank r_k trains the first r_k rows, those of the largest singular values.

Source: LoRA-GA (arXiv 2407.05000), for one site. Deviations: B is zero, so that nothing is subtracted from the base;
the gradient is the clients' mean, sketched as in randomised SVD (Halko et al., arXiv 0909.4061, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fedloom.errors import MethodError
from fedloom.lora.algebra import right_space
from fedloom.lora.initial import A_ROW_NORM, Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.around import Around, GradientSum
from fedloom.methods.client_half import ClientHalf, SketchesFirst
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.strategy import normalised
from fedloom.methods.sums import RunningFactors

OVERSAMPLING = 8
"""Columns of Ω beyond the rank."""


def sketch_rank(max_rank: int) -> int:
    """Return the columns of Ω where the largest rank of a client is ``max_rank``."""
    return max_rank + OVERSAMPLING


@dataclass(frozen=True)
class GradientStart(Around):
    """A method whose first A is made of the clients' gradients in round 1; its own first round is the second."""

    @property
    def client(self) -> ClientHalf:
        """Sketch first, then do the method's part."""
        return SketchesFirst(self.inner.client)

    def initial(self) -> ServerState:
        """Return the method's own state before its first round.

        Raises:
            MethodError: its clients share no start.
        """
        state = self.inner.initial()
        if state.start is None:
            raise MethodError(
                f"method.initialisation: expected a method whose clients share a start with gradient, got {self.name}; "
                "choose another method or another initialisation"
            )
        return state

    def start_for(self, state: ServerState, client: int) -> Adapter | Draw:
        """Return the draw of Ω, afterwards the method's start."""
        if state.round == 0:
            return Draw(("sketch",), sketch_rank(self.cohort.max_rank), random="b")
        return self.inner.start_for(_as_inner(state), client)

    def empty(self, state: ServerState) -> Any:
        """Return the sum of no sketches, afterwards the method's sum."""
        if state.round == 0:
            return GradientSum(RunningFactors(sketch_rank(self.cohort.max_rank)), self.weighting, {})
        return self.inner.empty(_as_inner(state))

    def finish(self, state: ServerState, sums: Any) -> Aggregate:
        """Make A of the sketches' sum, afterwards do what the method does."""
        if state.round > 0:
            return self.inner.finish(_as_inner(state), sums)
        assert state.start is not None
        sketch = sums.factors.mean()
        start = Adapter({name: _towards(pair, sketch[name]) for name, pair in state.start.items()})
        return Aggregate(start, Adapter(), Adapter(), 0.0, normalised(sums.weights))


def _as_inner(state: ServerState) -> ServerState:
    """Return a state as the method counts its rounds."""
    return replace(state, round=state.round - 1)


def _towards(drawn: Pair, sketch: Pair) -> Pair:
    """Return a pair whose A spans the sketch's largest directions; slots for which it has none keep their draw."""
    found_RI = right_space(sketch.a_RI, drawn.rank).to(drawn.a_RI.dtype) * A_ROW_NORM
    return Pair(drawn.b_OR, torch.cat([found_RI, drawn.a_RI[len(found_RI) :]], dim=0))
