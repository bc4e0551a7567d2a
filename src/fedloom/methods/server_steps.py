"""What the server does with a round's change D of the global product, in factored form.

A step turns D into S, which the global model moves by; with the plain step at learning rate 1, S is D and the papers'
methods stay as they are. No step depends on how a product is factored, unlike server optimisers that act on A and B
apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedloom.lora.algebra import compress, norm, stack
from fedloom.lora.pair import Adapter
from fedloom.methods.state import StepMemory


class ServerStep(Protocol):
    """A rule that moves the global product, from its change and ``Σ p_k ‖change of client k‖²``."""

    def move(self, change: Adapter, mean_squared_norm: float, memory: StepMemory) -> tuple[Adapter, StepMemory]:
        """Return S and what the step remembers."""
        ...


@dataclass(frozen=True)
class PlainStep:
    """``S = η D``. FLoRA's "scaling factor" experiment sweeps η = Σ p_k (arXiv 2409.05976, figure 4)."""

    learning_rate: float = 1.0

    def move(self, change: Adapter, mean_squared_norm: float, memory: StepMemory) -> tuple[Adapter, StepMemory]:
        """Return ``η D``, D itself for η = 1."""
        return _times(self.learning_rate, change), memory


@dataclass(frozen=True)
class MomentumStep:
    """``M ← β M + D``, ``S = η M``: heavy ball on the product (FedAvgM, arXiv 1909.06335, section 3)."""

    learning_rate: float = 1.0
    momentum: float = 0.5

    def move(self, change: Adapter, mean_squared_norm: float, memory: StepMemory) -> tuple[Adapter, StepMemory]:
        """Return ``η M`` and M, compressed losslessly."""
        velocity = memory.velocity
        moved = compress(stack([velocity, change], [self.momentum, 1.0])).adapter if velocity else change
        return _times(self.learning_rate, moved), StepMemory(moved)


@dataclass(frozen=True)
class FedExPStep:
    """``S = η_t D`` with ``η_t = min(cap, max(1, Σ p_k ‖D_k‖² / 2‖D‖²))``, larger where clients disagree.

    Source: FedExP (arXiv 2301.09604), eq. 3. Deviations: the norms are of products, from Gram matrices; the cap, since
    uncapped steps oscillate; the last iterates are not averaged.
    """

    learning_rate: float = 1.0
    cap: float = 1.5

    def move(self, change: Adapter, mean_squared_norm: float, memory: StepMemory) -> tuple[Adapter, StepMemory]:
        """Return ``η_t D``."""
        squared = norm(change) ** 2
        disagreement = mean_squared_norm / (2.0 * squared) if squared > 0.0 else 1.0
        rate = self.learning_rate * min(self.cap, max(1.0, disagreement))
        return _times(rate, change), memory


def _times(rate: float, adapter: Adapter) -> Adapter:
    return adapter if rate == 1.0 else adapter.scaled(rate)
