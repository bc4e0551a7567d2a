"""Negative log-likelihood of rows under a model, without gradient: what evaluation and training report alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.data.tokens import TokenSet
from fedloom.errors import ModelError
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.models.causal import causal_lm
from fedloom.training.cores import fitting, in_threads, own_cores, spread_passes
from fedloom.training.loss import target_nats
from fedloom.training.packing import split_by_tokens
from fedloom.training.row_passes import Batch, PackedPasses, RowPasses, row_passes
from fedloom.training.verified_head import not_finite, output_head

PassLosses = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class RowLosses:
    """Per row: the sum of its targets' losses in nats, and how many targets it has."""

    sum_nats: NDArray[np.float64]
    num_loss_tokens: NDArray[np.int64]

    @property
    def mean_nats(self) -> float:
        """Mean over all targets of all rows."""
        return float(self.sum_nats.sum() / self.num_loss_tokens.sum())

    def select(self, indices: NDArray[np.int64]) -> RowLosses:
        """Return the losses of the rows at ``indices``."""
        return RowLosses(self.sum_nats[indices], self.num_loss_tokens[indices])


def row_losses(model: LoRAModel | Any, rows: TokenSet, *, token_budget: int, cores: int | None = None) -> RowLosses:
    """Score rows with a causal LM or with what a ``LoRAModel`` is routed to (``route_all``).

    Rows go through in passes of at most ``token_budget`` tokens, sorted by length; the result is in the rows' order
    and does not depend on the passes. On a CPU passes are smaller, and ``cores`` of them are under way at once (by
    default as many as this process has cores); together they hold no more than the budget, and their number changes no
    bit. Targets are the supervised tokens that have a token before them.

    Raises:
        ModelError: if the passes of the model are not its own forward.
    """
    lm = causal_lm(model)
    output_head(lm)  # compares the model with itself once, before threads use it
    passes = scoring_passes(lm, rows, token_budget)
    _, at_once = scoring_spread(lm, lm.device.type, token_budget, cores)
    routed = model.routed_again() if isinstance(model, LoRAModel) else nullcontext

    def score(members: Sequence[int]) -> PassLosses:
        with routed():
            return score_pass(model, rows, members)

    return joined(len(rows), passes, in_threads(score, passes, at_once))


def scoring_passes(model: Any, rows: TokenSet, token_budget: int) -> list[list[int]]:
    """Return which rows go together through a causal LM that scores them."""
    part, _ = scoring_spread(model, model.device.type, token_budget)
    return passes_of(rows, part, row_passes(model))


def scoring_spread(model: Any, device: str, token_budget: int, cores: int | None = None) -> tuple[int, int]:
    """Return the tokens of a pass that scores, which no number of ``cores`` changes, and how many run at once."""
    own = own_cores(token_budget, torch.get_num_threads()) if cores is None else fitting(cores, token_budget)
    return spread_passes(model, device, token_budget, own)


def row_losses_of(
    lora: LoRAModel, adapter: Adapter, rows: TokenSet, *, token_budget: int, cores: int | None = None
) -> RowLosses:
    """Score rows with a base and an adapter beside it, which stays there."""
    lora.set_side(adapter or None)
    lora.route_all(None)
    return row_losses(lora, rows, token_budget=token_budget, cores=cores)


def check_finite(lora: LoRAModel, rows: TokenSet, *, token_budget: int) -> None:
    """Reject a float16 base that overflows on the longest row and the first ones, as many as fit into a pass.

    The samples with which the path to the loss is compared are short; other types hold what float32 does.

    Raises:
        ModelError: naming the setting of the type.
    """
    if lora.model.dtype != torch.float16:
        return
    longest = int(rows.lengths.argmax())
    order = np.array([longest, *(row for row in range(min(len(rows), token_budget)) if row != longest)])
    seen = rows.select(order[split_by_tokens(rows.lengths[order], token_budget)[0]])
    losses = row_losses_of(lora, Adapter(), seen, token_budget=token_budget)
    if not np.isfinite(losses.sum_nats).all():
        raise ModelError(not_finite(lora.model))


def passes_of(rows: TokenSet, token_budget: int, passes: RowPasses | None = None) -> list[list[int]]:
    """Return which rows go through together: sorted by length, at most ``token_budget`` tokens a pass.

    ``passes`` are those of the model that scores them; None: packed.
    """
    order = np.argsort(rows.lengths, kind="stable")
    groups = rows.lengths[order][:, None].tolist()
    return [order[part].tolist() for part in (passes or PackedPasses()).split(groups, token_budget)]


def joined(num_rows: int, passes: Sequence[Sequence[int]], scores: Iterable[PassLosses]) -> RowLosses:
    """Put the scores of passes in the places of their rows."""
    sum_nats = np.zeros(num_rows)
    num_loss_tokens = np.zeros(num_rows, dtype=np.int64)
    for members, (nats, counts) in zip(passes, scores, strict=True):
        sum_nats[members], num_loss_tokens[members] = nats, counts
    return RowLosses(sum_nats, num_loss_tokens)


@torch.no_grad()
def score_pass(model: LoRAModel | Any, rows: TokenSet, members: Sequence[int]) -> PassLosses:
    """Return the summed nats and the number of targets of the rows of one pass."""
    lm = causal_lm(model)
    head, passes = output_head(lm), row_passes(lm)
    batch: Batch = passes.batch([rows.row(index) for index in members], head.weight_VD.device)
    nats_S = target_nats(passes.target_states(lm, batch), head, batch.targets_S)
    row_of_target_S = batch.row_of_target_S.cpu().numpy()
    counts = np.bincount(row_of_target_S, minlength=len(members)).astype(np.int64)
    sum_nats = np.bincount(row_of_target_S, weights=nats_S.cpu().double().numpy(), minlength=len(members))
    return sum_nats.astype(np.float64), counts
