"""What every strategy is: what a client starts from and does, and what the next state is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, Self, assert_never

from fedloom.lora.algebra import norm
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import ClientHalf, EveryRound
from fedloom.methods.state import Aggregate, ServerState, Update


class Weighting(StrEnum):
    """How much a client counts: by rows (FedAvg), supervised tokens, equally, by the rows that it was asked to train
    on, or by ‖s B A‖ (HetLoRA)."""

    ROWS = "rows"
    TOKENS = "tokens"
    UNIFORM = "uniform"
    WORK = "work"
    NORM = "norm"


def weigh(update: Update, weighting: Weighting) -> float:
    """Return a client's weight before normalisation: the server's where it gave one, else by what it trained on."""
    if update.weight is not None:
        return update.weight
    match weighting:
        case Weighting.ROWS:
            return float(update.stats.num_rows)
        case Weighting.TOKENS:
            return float(update.stats.num_loss_tokens)
        case Weighting.UNIFORM | Weighting.WORK:  # what a client was asked to do, the server alone can say
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


class Sum(Protocol):
    """A round's updates, taken one at a time: sums merge in any order and grouping to the same, up to rounding."""

    def add(self, update: Update) -> None:
        """Take one update in."""
        ...

    def merge(self, other: Self) -> None:
        """Take another sum of the same round in."""
        ...


class Strategy(ABC):
    """A method's server half, pure functions over a frozen state; inputs are never changed.

    A round's aggregate is ``finish(state, sum)`` of a sum that starts from ``empty(state)`` and takes every update;
    partial sums may be built anywhere and merged.
    """

    name: str
    cohort: Cohort
    weighting: Weighting = Weighting.ROWS
    """How its sums weigh clients (:func:`weigh`); the server caps shares by it."""

    @property
    def client(self) -> ClientHalf:
        """What clients do; by default they train both factors and send them."""
        return EveryRound()

    @property
    def origin(self) -> Draw | None:
        """The draw that every client can make by itself; a factor that no round has changed since never crosses.

        None, the default: the whole start crosses every round.
        """
        return None

    @property
    def drawn(self) -> Draw | None:
        """The draw of the first start, where the first start is one: clients make it by themselves."""
        return self.origin

    @abstractmethod
    def initial(self) -> ServerState:
        """Return the state before the first round."""

    @abstractmethod
    def start_for(self, state: ServerState, client: int) -> Adapter | Draw:
        """Return what a client trains from, at its own rank: what is sent, or the name of a fresh draw."""

    @abstractmethod
    def empty(self, state: ServerState) -> Any:
        """Return the sum of no updates."""

    @abstractmethod
    def finish(self, state: ServerState, sums: Any) -> Aggregate:
        """Return what a sum of updates amounts to."""

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> Aggregate:
        """Take the updates one at a time and return what they amount to."""
        sums = self.empty(state)
        for update in updates:
            sums.add(update)
        return self.finish(state, sums)


def normalised(weights: Mapping[int, float]) -> dict[int, float]:
    """Return the weights divided by their sum, in the order of the client ids."""
    total = sum(weights.values())
    return {client: weights[client] / total for client in sorted(weights)}
