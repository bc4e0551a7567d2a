"""What a client counts while it trains: one record, from the training loop to the update and the round's metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TrainingStats:
    """A client's counts of one round.

    ``num_tokens`` and ``num_loss_tokens`` count what was processed; ``loss_nats`` is the mean over all of the round's
    targets and ``loss_last_nats`` over those of the last batch, both without label smoothing.
    """

    num_rows: int
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_steps: int = 0
    loss_nats: float = 0.0
    loss_last_nats: float = 0.0
    seconds: float = 0.0

    @property
    def is_finite(self) -> bool:
        """Whether both losses are finite."""
        return math.isfinite(self.loss_nats) and math.isfinite(self.loss_last_nats)

    @property
    def tells_loss(self) -> bool:
        """Whether the losses are of any target: of private steps they are not told."""
        return self.num_loss_tokens > 0

    def without_rows(self) -> TrainingStats:
        """Return what says nothing of single rows: the client's rows in all, its steps and its time."""
        return replace(self, num_tokens=0, num_loss_tokens=0, loss_nats=0.0, loss_last_nats=0.0)
