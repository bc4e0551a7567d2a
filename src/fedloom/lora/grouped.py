"""The products of many clients' factors in few calls: what a GPU needs, where a loop over clients starves it.

Clients of similar rank and number of tokens form a bucket. Their token rows and factors are gathered to equal sizes,
so that one batched product serves all of them. What fills up is a client's own last row, weighed with zero: no
client's numbers meet another's, whatever they are.

Letters: T tokens, I in, O out, R rows of all slots' factors; in a bucket n clients, L tokens, r ranks, K of n·L that
are real tokens, P of n·r that are real ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedloom.lora.route import Block

RANK_RATIO, LENGTH_RATIO = 8, 4
"""A bucket's ranks and tokens differ by less than this: filling up is cheaper than another call, up to a point."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """Clients that share a product: which rows each gathers, and what of the result is real.

    ``weight_nLr`` is a client's scale at its own tokens and ranks, zero elsewhere.
    """

    tokens_nL: Tensor
    ranks_nr: Tensor
    weight_nLr: Tensor
    kept_K: Tensor
    tokens_K: Tensor
    kept_P: Tensor
    ranks_P: Tensor


def buckets_of(blocks: Sequence[Block], scales: Sequence[float], like: Tensor) -> list[Bucket]:
    """Group the blocks of a pass over rows ``like`` these; ``scales`` are the slots'."""
    buckets, dtype = [], torch.promote_types(like.dtype, torch.float32)
    for members in _similar(blocks):
        tokens_nL, is_token_nL = _filled([block.tokens for block in members])
        ranks_nr, is_rank_nr = _filled([block.rows for block in members])
        scale_n = torch.tensor([scales[block.slot] for block in members], dtype=dtype)
        weight_nLr = scale_n[:, None, None] * is_token_nL[:, :, None] * is_rank_nr[:, None, :]
        kept_K, kept_P = is_token_nL.flatten().nonzero()[:, 0], is_rank_nr.flatten().nonzero()[:, 0]
        places = (tokens_nL, ranks_nr, weight_nLr, kept_K, tokens_nL.flatten()[kept_K])
        buckets.append(Bucket(*(t.to(like.device) for t in (*places, kept_P, ranks_nr.flatten()[kept_P]))))
    return buckets


def add_forward(y_TO: Tensor, x_TI: Tensor, a_RI: Tensor, bt_RO: Tensor, buckets: Sequence[Bucket]) -> list[Tensor]:
    """Add ``s b a x`` of every client to its rows of y; return the middles (n, L, r) that backward needs."""
    middles = []
    for bucket in buckets:
        middle_nLr = torch.bmm(_rows(x_TI, bucket.tokens_nL), _rows(a_RI, bucket.ranks_nr).mT)
        middle_nLr.mul_(bucket.weight_nLr)
        _add_rows(y_TO, bucket.tokens_K, torch.bmm(middle_nLr, _rows(bt_RO, bucket.ranks_nr)), bucket.kept_K)
        middles.append(middle_nLr)
    return middles


def add_backward(
    sums: tuple[Tensor | None, Tensor, Tensor],
    grad_TO: Tensor,
    x_TI: Tensor,
    factors: tuple[Tensor, Tensor],
    middles: Sequence[Tensor],
    buckets: Sequence[Bucket],
    mask_TI: Tensor | None,
) -> None:
    """Add the gradients at x (if wanted), a and bt to ``sums``; ``x_TI`` is what the adapters saw, dropout included."""
    (grad_x_TI, grad_a_RI, grad_bt_RO), (a_RI, bt_RO) = sums, factors
    for bucket, middle_nLr in zip(buckets, middles, strict=True):
        grad_nLO = _rows(grad_TO, bucket.tokens_nL)
        grad_middle_nLr = torch.bmm(grad_nLO, _rows(bt_RO, bucket.ranks_nr).mT).mul_(bucket.weight_nLr)
        if grad_x_TI is not None:
            at_x_nLI = torch.bmm(grad_middle_nLr, _rows(a_RI, bucket.ranks_nr))
            if mask_TI is not None:
                at_x_nLI.mul_(_rows(mask_TI, bucket.tokens_nL))
            _add_rows(grad_x_TI, bucket.tokens_K, at_x_nLI, bucket.kept_K)
        at_a_nrI = torch.bmm(grad_middle_nLr.mT, _rows(x_TI, bucket.tokens_nL))
        _add_rows(grad_a_RI, bucket.ranks_P, at_a_nrI, bucket.kept_P)
        _add_rows(grad_bt_RO, bucket.ranks_P, torch.bmm(middle_nLr.mT, grad_nLO), bucket.kept_P)


def _rows(whole: Tensor, places_nL: Tensor) -> Tensor:
    return whole.index_select(0, places_nL.flatten()).view(*places_nL.shape, whole.shape[1])


def _add_rows(sum_X: Tensor, places: Tensor, found: Tensor, kept: Tensor) -> None:
    sum_X.index_add_(0, places, found.flatten(0, 1).index_select(0, kept).to(sum_X.dtype))


def _filled(parts: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Return the rows of parts, filled up to the longest with a part's own last one, and which are real."""
    starts, ends = torch.tensor([part.start for part in parts]), torch.tensor([part.stop for part in parts])
    wanted = starts[:, None] + torch.arange(int((ends - starts).max()))
    return torch.minimum(wanted, ends[:, None] - 1), wanted < ends[:, None]


def _similar(blocks: Sequence[Block]) -> list[list[Block]]:
    """Return the blocks that have tokens in groups of similar rank, then length, both falling."""
    groups: list[list[Block]] = []
    for of_rank in _runs(
        [block for block in blocks if _length(block.tokens)], lambda one: _length(one.rows), RANK_RATIO
    ):
        groups += _runs(of_rank, lambda one: _length(one.tokens), LENGTH_RATIO)
    return groups


def _runs(blocks: Sequence[Block], size: Callable[[Block], int], ratio: int) -> list[list[Block]]:
    runs: list[list[Block]] = []
    for block in sorted(blocks, key=size, reverse=True):
        if runs and size(runs[-1][0]) < ratio * size(block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _length(part: slice) -> int:
    return int(part.stop - part.start)
