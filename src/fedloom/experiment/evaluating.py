"""How good a state is: the loss on held-out rows, of the global model or of every client's own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from fedloom.aggregation.records import ServerState
from fedloom.data.tokens import TokenSet
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.training.scoring import row_losses


def held_out_loss(lora: LoRAModel, adapter: Adapter, rows: TokenSet, token_budget: int) -> dict[str, Any]:
    """Return the mean loss in nats per supervised token, its perplexity, and the counts."""
    lora.close()
    lora.set_side(adapter or None)
    lora.route_all(None)
    losses = row_losses(lora, rows, token_budget=token_budget)
    return {
        "loss_nats": losses.mean_nats,
        "perplexity": math.exp(min(losses.mean_nats, 700.0)),
        "num_loss_tokens": int(losses.num_loss_tokens.sum()),
        "num_rows": len(rows),
    }


def evaluate_state(lora: LoRAModel, state: ServerState, rows: TokenSet | None, token_budget: int) -> dict[str, Any]:
    """Score a state; where every client has its own model, each of them, and report their mean and spread."""
    if rows is None:
        return {}
    if not state.own:
        return held_out_loss(lora, state.global_adapter(), rows, token_budget)
    scores = {client: held_out_loss(lora, own, rows, token_budget) for client, own in sorted(state.own.items())}
    return _mean_of(scores)


def _mean_of(scores: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    losses = [score["loss_nats"] for score in scores.values()]
    first = next(iter(scores.values()))
    if len(losses) == 1:
        return dict(first)
    return {
        "loss_nats": statistics.fmean(losses),
        "perplexity": math.exp(min(statistics.fmean(losses), 700.0)),
        "num_loss_tokens": first["num_loss_tokens"],
        "num_rows": first["num_rows"],
        "loss_nats_of_client": {str(client): score["loss_nats"] for client, score in scores.items()},
        "loss_nats_sd": statistics.stdev(losses),
    }
