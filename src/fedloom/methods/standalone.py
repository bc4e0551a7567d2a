"""The controls in a strategy's clothes: every client keeps its own adapter and nothing crosses.

With one client that owns all rows this is centralised tuning; with the real clients it is local-only tuning.
Source: the controls of FedIT (arXiv 2305.05644), section 4, and FLoRA (arXiv 2409.05976), section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.methods.strategy import Cohort


@dataclass(frozen=True)
class Standalone:
    """One adapter per client, carried on from round to round by its owner alone."""

    cohort: Cohort
    name: str = "standalone"

    def initial(self) -> ServerState:
        """Start with no adapters; a client's first is drawn fresh."""
        return ServerState()

    def start_for(self, state: ServerState, client: int) -> Adapter | Draw:
        """Return the client's own adapter, at first a draw of its own."""
        return state.own.get(client) or Draw(("own", client))

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> Aggregate:
        """Keep each update as its sender's adapter."""
        received = {update.client: update for update in updates}
        own = {client: update.adapter for client, update in received.items()}
        nothing, weights = Adapter(), dict.fromkeys(received, 1.0)
        return Aggregate(None, nothing, nothing, 0.0, weights, own={**state.own, **own})
