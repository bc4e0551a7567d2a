"""What the server does with a round's change D of the global product, in factored form.

A step turns D into S, which the global model moves by. The strategies already move it by D, so a step only hands back
``S − D`` to join the side adapter; for the plain step that is nothing and the papers' methods stay as they are.
None depends on how a product is factored, unlike server optimisers that act on A and B apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedloom.aggregation.records import Aggregate
from fedloom.lora.algebra import compress, norm, stack
from fedloom.lora.pair import Adapter


class ServerStep(Protocol):
    """A rule that moves the global product."""

    def correction(self, aggregate: Aggregate, velocity: Adapter) -> tuple[Adapter, Adapter]:
        """Return ``S − D`` and the next velocity."""
        ...


@dataclass(frozen=True)
class PlainStep:
    """``S = η D``. FLoRA's "scaling factor" experiment sweeps η = Σ p_k (arXiv 2409.05976, figure 4)."""

    learning_rate: float = 1.0

    def correction(self, aggregate: Aggregate, velocity: Adapter) -> tuple[Adapter, Adapter]:
        """Return ``(η − 1) D``."""
        surplus = self.learning_rate - 1.0
        return (aggregate.change.scaled(surplus) if surplus else Adapter()), velocity


@dataclass(frozen=True)
class MomentumStep:
    """``M ← β M + D``, ``S = η M``: heavy ball on the product (FedAvgM, arXiv 1909.06335, section 3)."""

    learning_rate: float = 1.0
    momentum: float = 0.5

    def correction(self, aggregate: Aggregate, velocity: Adapter) -> tuple[Adapter, Adapter]:
        """Return ``η M − D`` and M, both compressed losslessly."""
        change = aggregate.change
        moved = compress(stack([velocity, change], [self.momentum, 1.0])).adapter if velocity else change
        return compress(stack([moved, change], [self.learning_rate, -1.0])).adapter, moved


@dataclass(frozen=True)
class FedExPStep:
    """``S = η_t D`` with ``η_t = min(cap, max(1, Σ p_k ‖D_k‖² / 2‖D‖²))``, larger where clients disagree.

    Source: FedExP (arXiv 2301.09604), eq. 3. Deviations: the norms are of products, from Gram matrices; the cap, since
    uncapped steps oscillate; the last iterates are not averaged.
    """

    learning_rate: float = 1.0
    cap: float = 1.5

    def correction(self, aggregate: Aggregate, velocity: Adapter) -> tuple[Adapter, Adapter]:
        """Return ``(η_t − 1) D``."""
        squared = norm(aggregate.change) ** 2
        disagreement = aggregate.mean_squared_norm / (2.0 * squared) if squared > 0.0 else 1.0
        rate = self.learning_rate * min(self.cap, max(1.0, disagreement))
        return (aggregate.change.scaled(rate - 1.0) if rate != 1.0 else Adapter()), velocity
