"""What is counted and recorded of a client's part in a period."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fedloom.federation.intake import ClientRecord
from fedloom.split.departures import Departure
from fedloom.training.stats import TrainingStats


@dataclass(frozen=True)
class SplitClientRecord(ClientRecord):
    """A client's part in a period.

    ``upload_bytes`` and ``download_bytes`` are totals; of them, the two here are activations' and gradients', and the
    rest are adapters. ``left_at`` is None of a client that stayed to the end.
    """

    activation_upload_bytes: int = 0
    activation_download_bytes: int = 0
    left_at: Departure | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return super().as_dict() | {"left_at": None if self.left_at is None else self.left_at.as_dict()}


@dataclass
class Tally:
    """What a client has trained on since the period began."""

    steps: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    begun: float = field(default_factory=time.perf_counter)

    def stats(self, num_rows: int) -> TrainingStats:
        """Return it as what its update says, for a client of so many rows."""
        return TrainingStats(
            num_rows, self.tokens, self.loss_tokens, self.steps, seconds=time.perf_counter() - self.begun
        )
