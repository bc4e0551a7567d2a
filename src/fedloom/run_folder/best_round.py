"""Which of a run's rounds is the best by its own measure, and whether it has waited long enough for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]


def losses_of(records: Records) -> dict[int, float]:
    """Return the loss of every evaluated round, in nats per token, in order; numbers that are not finite are none."""
    found = {}
    for record in records:
        loss = (record.get("eval") or {}).get("loss_nats")
        if isinstance(loss, float | int) and math.isfinite(loss):
            found[int(record["round"])] = float(loss)
    return found


def best_round(records: Records) -> int | None:
    """Return the round of the lowest loss, the earliest of several; None where none was evaluated."""
    losses = losses_of(records)
    return min(losses, key=losses.__getitem__) if losses else None


def is_over(records: Records, patience: int | None) -> bool:
    """Tell whether the last ``patience`` evaluations brought no lower loss than one before them."""
    best = best_round(records)
    if patience is None or best is None:
        return False
    return sum(1 for record in records if record.get("eval") and record["round"] > best) >= patience
