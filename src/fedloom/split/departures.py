"""When a client left a period, so that a run which lost one can be replayed where all clients are at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Stage = Literal["begin", "activations", "tails", "loss", "finish", "end"]
"""Parts of a period and of its steps, in order. ``loss``: what the client sent made a loss that is not finite."""


@dataclass(frozen=True)
class Departure:
    """The moment from which a client no longer took part in a period; steps are counted from 0 over the run."""

    step: int
    micro_batch: int
    stage: Stage

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


Departures = Callable[[int], Mapping[int, Departure]]
"""Who leaves when, from a period's number: what a run that is replayed has recorded."""


def nobody_leaves(_: int) -> Mapping[int, Departure]:
    """Return no departures: every client takes part until it fails."""
    return {}
