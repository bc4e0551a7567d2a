"""FedAdagrad, FedAdam and FedYogi on the product, in factored form: a change of rank R stays one of rank R.

Second moments of every number of an out × in product are as large as the weight. Kept are their means over rows and
over columns, of which the outer product is the best estimate of rank one (Adafactor). With D the round's change:

    r_i = mean_j D_ij² + ε²,  c_j = mean_i D_ij² + ε²          from Gram matrices, no product is formed
    adagrad  v ← v + u      adam  v ← β₂ v + (1 − β₂) u      yogi  v ← v − (1 − β₂) u sign(v − u)      u = r, then c
    M ← β₁ M + (1 − β₁) D,   S_ij = η σ M_ij / √V_ij,   V_ij = v^r_i v^c_j / √(mean v^r · mean v^c)

σ is the root mean square of the first round's change, over all modules; ε is in its units, and moments begin at ε².

Sources: adaptive federated optimisation (arXiv 2003.00295), algorithm 2; Adafactor (arXiv 1804.04235), algorithm 4.
Deviations: second moments of rank one; ε² joins the squares, as in Adafactor, instead of ε their root; Yogi's rule is
applied to the means; η and ε are in units of σ, so that a learning rate of 1 begins with steps as long as the plain
step's, whatever the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import torch
from torch import Tensor

from fedloom.lora.algebra import compress, norm, stack
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import StepMemory

UNIT = "unit"
"""Names σ² among the moments; the others are ``<module>.rows`` and ``<module>.columns``."""


class Adaptive(StrEnum):
    """How second moments are gathered."""

    ADAGRAD = "fedadagrad"
    ADAM = "fedadam"
    YOGI = "fedyogi"


@dataclass(frozen=True)
class AdaptiveStep:
    """A step along the change, shorter in rows and columns that have changed much."""

    kind: Adaptive
    learning_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 0.1

    def move(self, change: Adapter, mean_squared_norm: float, memory: StepMemory) -> tuple[Adapter, StepMemory]:
        """Return S, and M with the second moments."""
        unit = memory.moments[UNIT] if UNIT in memory.moments else _mean_square(change)
        if float(unit) == 0.0:
            return change, memory  # nothing has moved yet: nothing to measure by
        moments = {UNIT: unit}
        for name, pair in change.items():
            for part, fresh in zip(("rows", "columns"), mean_squares(pair), strict=True):
                key = f"{name}.{part}"
                moments[key] = self._gathered(memory.moments.get(key), fresh, self.epsilon**2 * unit)
        momentum = self._momentum(change, memory.velocity)
        rate = self.learning_rate * math.sqrt(float(unit))
        moved = {name: _divided(pair, name, moments, rate) for name, pair in momentum.items()}
        return Adapter(moved), StepMemory(momentum if self.beta1 > 0.0 else Adapter(), moments)

    def _momentum(self, change: Adapter, velocity: Adapter) -> Adapter:
        """Return M: of the rank of the change without a memory, else compressed losslessly."""
        if self.beta1 == 0.0:
            return change
        fresh = change.scaled(1.0 - self.beta1)
        return compress(stack([velocity, fresh], [self.beta1, 1.0])).adapter if velocity else fresh

    def _gathered(self, held: Tensor | None, fresh: Tensor, floor: Tensor) -> Tensor:
        before, square = floor.expand_as(fresh) if held is None else held, fresh + floor
        match self.kind:
            case Adaptive.ADAGRAD:
                return before + square
            case Adaptive.ADAM:
                return self.beta2 * before + (1.0 - self.beta2) * square
            case Adaptive.YOGI:
                return before - (1.0 - self.beta2) * square * torch.sign(before - square)
        assert_never(self.kind)


def mean_squares(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the mean of the product's squares over each row (O) and each column (I), in float64."""
    b_OR, a_RI = pair.b_OR.double(), pair.a_RI.double()
    rows_O = ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1) / a_RI.shape[1]
    columns_I = (((b_OR.T @ b_OR) @ a_RI) * a_RI).sum(0) / b_OR.shape[0]
    return rows_O.clamp_min(0.0), columns_I.clamp_min(0.0)


def _mean_square(change: Adapter) -> Tensor:
    numbers = sum(num_out * num_in for num_out, num_in in change.shapes.values())
    return torch.tensor(norm(change) ** 2 / max(1, numbers), dtype=torch.float64)


def _divided(pair: Pair, name: str, moments: Mapping[str, Tensor], rate: float) -> Pair:
    """Return ``rate · M / √V`` as factors."""
    rows_O, columns_I = moments[f"{name}.rows"], moments[f"{name}.columns"]
    scale = rate * float(rows_O.mean() * columns_I.mean()) ** 0.25
    b_OR, a_RI = pair.b_OR.double() / rows_O.sqrt()[:, None], pair.a_RI.double() / columns_I.sqrt()[None, :]
    return Pair((b_OR * scale).to(pair.b_OR.dtype), a_RI.to(pair.a_RI.dtype))
