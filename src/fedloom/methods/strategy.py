"""What every strategy is: what a client starts from, and what the next state is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, assert_never

from fedloom.lora.algebra import norm
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Aggregate, ServerState, Update


class Weighting(StrEnum):
    """How much a client counts: by rows (FedAvg), supervised tokens, equally, or by ‖s B A‖ (HetLoRA)."""

    ROWS = "rows"
    TOKENS = "tokens"
    UNIFORM = "uniform"
    NORM = "norm"


def weigh(update: Update, weighting: Weighting) -> float:
    """Return a client's weight before normalisation."""
    match weighting:
        case Weighting.ROWS:
            return float(update.num_rows)
        case Weighting.TOKENS:
            return float(update.num_loss_tokens)
        case Weighting.UNIFORM:
            return 1.0
        case Weighting.NORM:
            return norm(update.adapter)
    assert_never(weighting)


@dataclass(frozen=True)
class Cohort:
    """The population a strategy serves: every module's (out, in), and each client's rank by a function."""

    shapes: Mapping[str, tuple[int, int]]
    max_rank: int
    rank_of: Callable[[int], int]
    seed: int


class Strategy(Protocol):
    """Two pure functions over a frozen state; inputs are never changed, arrival order does not matter."""

    @property
    def name(self) -> str:
        """The method's name, as in ``method.name``."""
        ...

    def initial(self) -> ServerState:
        """Return the state before the first round."""
        ...

    def start_for(self, state: ServerState, client: int) -> Adapter | Draw:
        """Return what a client trains from, at its own rank: what is sent, or the name of a fresh draw."""
        ...

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> Aggregate:
        """Take the updates one at a time and return what they amount to."""
        ...


def normalised(weights: Mapping[int, float]) -> dict[int, float]:
    """Return the weights divided by their sum, in the order of the client ids."""
    total = sum(weights.values())
    return {client: weights[client] / total for client in sorted(weights)}
