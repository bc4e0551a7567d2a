"""The controls in a strategy's clothes: every client keeps its own adapter and moments, and nothing crosses.

With one client that owns all rows this is centralised tuning; with the real clients it is local-only tuning.
Source: the controls of FedIT (arXiv 2305.05644), section 4, and FLoRA (arXiv 2409.05976), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter
from fedloom.methods.client_half import ClientHalf, EveryRound, Moments, Work
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy


@dataclass
class Attendance:
    """Who trained: all there is to sum where nothing crosses."""

    weights: dict[int, float] = field(default_factory=dict)

    def add(self, update: Update) -> None:
        """Note one client."""
        self.weights[update.client] = 1.0

    def merge(self, other: Attendance) -> None:
        """Note another sum's clients."""
        self.weights |= other.weights


@dataclass(frozen=True)
class Standalone(Strategy):
    """One adapter per client, carried on from round to round by its owner alone."""

    cohort: Cohort
    name: str = "standalone"

    @property
    def client(self) -> ClientHalf:
        """Train both factors, send nothing, keep all."""
        return EveryRound(Work(sends=frozenset(), keeps=BOTH, moments=Moments.OWN))

    def initial(self) -> ServerState:
        """Start with nothing shared."""
        return ServerState()

    def start_for(self, state: ServerState, client: int) -> Draw:
        """Return the draw of a client's first adapter; afterwards it continues from its own."""
        return Draw(("own", client))

    def empty(self, state: ServerState) -> Attendance:
        """Return nobody."""
        return Attendance()

    def finish(self, state: ServerState, sums: Attendance) -> Aggregate:
        """Return that nothing is shared."""
        return Aggregate(None, Adapter(), Adapter(), 0.0, sums.weights)
