"""FLoRA: adapters are stacked, so their products add up without noise, whatever the ranks.

    A ← [A_1; …; A_K],   B ← [p_1 s_1 B_1, …, p_K s_K B_K],   B A = Σ p_k s_k B_k A_k

Every round each client trains a fresh adapter beside what all have added so far; the stack joins the side adapter
and the base is never touched. Ours beyond the paper: clients may draw the same fresh ``A`` (``shared``), and the
stack may be compressed before it is sent, losslessly or within a tolerance whose remainder is sent later.

Source: FLoRA (arXiv 2409.05976), Algorithm 1. Deviations: p_k multiplies B instead of A (the same product); the base
stays as it is instead of being merged into, which is exact for quantised and 16-bit bases too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch

from fedloom.lora.algebra import norm, stack
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy, Weighting, normalised, weigh


class Initialisation(StrEnum):
    """Whether the clients of a round draw their fresh ``A`` each for itself (the paper) or all the same."""

    INDEPENDENT = "independent"
    SHARED = "shared"


@dataclass
class Stack:
    """A round's adapters and weights by client: nothing of a stack can be summed away."""

    weighting: Weighting
    adapters: dict[int, Adapter] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)

    def add(self, update: Update) -> None:
        """Take one client's adapter in."""
        self.adapters[update.client] = update.adapter
        self.weights[update.client] = weigh(update, self.weighting)

    def merge(self, other: Stack) -> None:
        """Take another stack's adapters in."""
        self.adapters |= other.adapters
        self.weights |= other.weights


@dataclass(frozen=True)
class FLoRA(Strategy):
    """The stack of the clients' fresh adapters."""

    cohort: Cohort
    weighting: Weighting = Weighting.ROWS
    initialisation: Initialisation = Initialisation.INDEPENDENT
    name: str = "flora"

    def initial(self) -> ServerState:
        """Start from the bare base."""
        return ServerState()

    def start_for(self, state: ServerState, client: int) -> Draw:
        """Return a fresh draw every round: one a client, or one for all."""
        everyone = (state.round + 1,)
        return Draw(everyone if self.initialisation is Initialisation.SHARED else (*everyone, client))

    def empty(self, state: ServerState) -> Stack:
        """Return an empty stack."""
        return Stack(self.weighting)

    def finish(self, state: ServerState, sums: Stack) -> Aggregate:
        """Stack the adapters in the order of the client ids."""
        adapters, shares = sums.adapters, normalised(sums.weights)
        stacked = stack([adapters[client] for client in shares], list(shares.values()))
        return Aggregate(
            start=None,
            side=stacked,
            ideal=stack([adapters[c].to(torch.float64) for c in shares], list(shares.values())),
            mean_squared_norm=sum(share * norm(adapters[client]) ** 2 for client, share in shares.items()),
            weights=shares,
        )
