"""How each client fares on rows of its own: under the one adapter for all, or under its own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedloom.data.own_rows import OwnRows
from fedloom.methods.state import Standing
from fedloom.results.state_scores import Score
from fedloom.training.row_losses import RowLosses

TENTH = 0.1


def score_clients(score: Score, state: Standing, own: OwnRows, token_budget: int) -> dict[str, Any]:
    """Score every client on its own held-out rows; nothing where there are none.

    Where clients have adapters of their own, each is scored under its own, and clients without one are left out.
    """
    if own.tokens is None:
        return {}
    if state.own:
        scored = [client for client in own.members if client in state.own]
        losses = {c: score(state.own[c], own.tokens.select(own.members[c]), token_budget) for c in scored}
    else:
        together = score(state.shared, own.tokens, token_budget)
        losses = {client: together.select(rows) for client, rows in own.members.items()}
    return {"clients": _spread(losses, own, "own" if state.own else "global")} if losses else {}


def _spread(losses: dict[int, RowLosses], own: OwnRows, adapter: str) -> dict[str, Any]:
    means = {client: found.mean_nats for client, found in losses.items()}
    rows = [len(own.members[client]) for client in losses]
    ordered = list(means.values())
    return {
        "adapter": adapter,
        "num_clients": len(means),
        "num_rows": sum(rows),
        "loss_nats": statistics.fmean(ordered),
        "loss_nats_by_rows": statistics.fmean(ordered, rows),
        "loss_nats_worst": max(ordered),
        "loss_nats_worst_tenth": exceeded_by(ordered, [1] * len(ordered)),
        "loss_nats_worst_tenth_by_rows": exceeded_by(ordered, rows),
        "loss_nats_of_client": {own.names[client]: loss for client, loss in means.items()},
    }


def exceeded_by(losses: Sequence[float], weights: Sequence[float], share: float = TENTH) -> float:
    """Return the largest loss that clients of at least this share of the weight have or exceed."""
    order = np.argsort(losses)[::-1]
    reached = np.cumsum(np.asarray(weights, dtype=np.float64)[order]) >= share * sum(weights) * (1.0 - 1e-12)
    return float(np.asarray(losses)[order][int(np.argmax(reached))])
