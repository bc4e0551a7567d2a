"""Cross-entropy on supervised tokens only, never holding more than a tile of logits.

The gradient with respect to the hidden states is computed together with the loss, tile by tile; the head is frozen,
so its weight needs none. With K clients in a pass each target carries a weight, one over its client's number of
targets in the batch, so that the sum is the sum of the clients' mean losses.

Letters: S supervised targets, C targets of a chunk, D width, V vocabulary or a part of it.
"""

from __future__ import annotations

import math
from itertools import pairwise, starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom.training.output_head import OutputHead, linear

CPU_ROWS, CPU_VOCABULARY = 384, 2048
"""Targets at most, and tokens of the vocabulary, whose logits a CPU holds at a time: few enough for its cache, enough
for a matrix product's full rate. The second is the same for every batch, as the order of a sum is."""

HELD_LOGITS = {"cuda": 1 << 27}
"""Logits that another kind of device holds at a time, of the whole vocabulary; 2^24 where it is not named."""


def supervised_cross_entropy(
    hidden_SD: Tensor,
    head: OutputHead,
    targets_S: Tensor,
    weights_S: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return ``Σ_s w_s·((1 − ε)·nll_s + ε·mean_v(−log p_sv))`` and the targets' ``nll_S`` in nats, without graph.

    The first is differentiable with respect to the hidden states; the second is the plain negative log-likelihood,
    whatever the smoothing ε.
    """
    loss, nats_S = _CrossEntropy.apply(hidden_SD, head, targets_S, weights_S, label_smoothing)  # type: ignore[no-untyped-call]
    return loss, nats_S


def target_nats(hidden_SD: Tensor, head: OutputHead, targets_S: Tensor) -> Tensor:
    """Return the targets' negative log-likelihoods (S,) in nats, without gradient."""
    nats_S = torch.empty(targets_S.shape, dtype=accumulator(hidden_SD.dtype), device=hidden_SD.device)
    device = hidden_SD.device.type
    with torch.no_grad():
        for rows in _chunks(len(targets_S), tile_of(device, head.vocabulary)):
            nats_S[rows] = chunk_nats(hidden_SD[rows], head, targets_S[rows], device)
    return nats_S


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient in one sweep over chunks of targets."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, head: OutputHead, targets_S: Tensor, weights_S: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        # The gradient is computed in the forward pass, while logits exist: backward would need all again.
        grad_SD = torch.empty_like(hidden_SD)
        nats_S = torch.empty(targets_S.shape, dtype=accumulator(hidden_SD.dtype), device=hidden_SD.device)
        loss = nats_S.new_zeros(())
        device = hidden_SD.device.type
        for rows in _chunks(len(targets_S), tile_of(device, head.vocabulary)):
            weight_C = weights_S[rows].to(nats_S.dtype)
            found = chunk_gradient(hidden_SD[rows], head, targets_S[rows], weight_C, smoothing, device)
            nats_S[rows], smooth_C, grad_SD[rows] = found
            loss += weight_C @ ((1.0 - smoothing) * nats_S[rows] + smoothing * smooth_C)
        ctx.save_for_backward(grad_SD)
        ctx.mark_non_differentiable(nats_S)
        return loss, nats_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SD,) = ctx.saved_tensors
        return grad_SD * grads[0].to(grad_SD.dtype), None, None, None, None


def chunk_nats(hidden_CD: Tensor, head: OutputHead, targets_C: Tensor, device: str) -> Tensor:
    """Return the negative log-likelihoods (C,) of one chunk of targets, as a kind of device computes them."""
    dtype = accumulator(hidden_CD.dtype)
    log_total_C1 = of_target_C1 = hidden_CD.new_full((len(targets_C), 1), -math.inf, dtype=dtype)
    for start, part in head.parts(tile_of(device, head.vocabulary).vocabulary):
        logits_CV = part.logits(hidden_CD)
        of_target_C1 = _read_targets(of_target_C1, logits_CV, targets_C[:, None] - start)
        log_total_C1 = torch.logaddexp(log_total_C1, logits_CV.logsumexp(1, keepdim=True))
    return (log_total_C1 - of_target_C1)[:, 0]


def chunk_gradient(
    hidden_CD: Tensor, head: OutputHead, targets_C: Tensor, weight_C: Tensor, smoothing: float, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nll (C,), mean −log p over the vocabulary (C,) and the weighed gradient at the hidden states (C, D).

    Of one chunk of targets, as a kind of device computes them. The gradient at the logits is
    ``p − (1 − ε)·onehot − ε/V``.
    """
    if head.is_plain and _counts_passes(device):
        return _in_few_passes(head, hidden_CD, targets_C, weight_C, smoothing)
    return _by_parts(head, hidden_CD, targets_C, weight_C, smoothing, tile_of(device, head.vocabulary).vocabulary)


def _by_parts(
    head: OutputHead, hidden_CD: Tensor, targets_C: Tensor, weight_C: Tensor, smoothing: float, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`chunk_gradient` does, going through the vocabulary in parts of ``size`` tokens.

    Each part has a softmax of its own, whose gradient counts by the part's share of the whole: no logit is needed again
    once its part is done.
    """
    target_C1, num_rows, lowest = targets_C[:, None], len(targets_C), torch.finfo(weight_C.dtype).min
    of_target_C1 = weight_C.new_full((num_rows, 1), -math.inf)
    log_total_C1 = torch.full_like(of_target_C1, lowest)
    mean_C1, grad_CD = torch.zeros_like(log_total_C1), weight_C.new_zeros(hidden_CD.shape)
    even_CD = torch.zeros_like(grad_CD) if smoothing else grad_CD
    for start, part in head.parts(size):
        logits_CV = part.logits(hidden_CD)
        of_target_C1 = _read_targets(of_target_C1, logits_CV, target_C1 - start)
        if smoothing:
            share = part.vocabulary / head.vocabulary
            mean_C1.add_(logits_CV.mean(1, keepdim=True), alpha=share)
            even_CD.add_(part.pull_back_mean(logits_CV), alpha=share)
        # A bias of minus infinity may rule out all of a part: its share is then 0, and not 0 of 0.
        top_C1 = logits_CV.amax(1, keepdim=True).clamp_(min=lowest)
        # In place where possible, since logits are the largest tensor here; pull_back needs the softcapped ones.
        share_CV = (logits_CV - top_C1 if head.softcap is not None else logits_CV.sub_(top_C1)).exp_()
        total_C1 = share_CV.sum(1, keepdim=True).clamp_(min=1.0)
        own_CD = part.pull_back(share_CV.div_(total_C1), logits_CV).to(grad_CD.dtype)
        own_total_C1 = total_C1.log_().add_(top_C1)
        both_C1 = torch.logaddexp(log_total_C1, own_total_C1)
        grad_CD.mul_((log_total_C1 - both_C1).exp_()).addcmul_(own_CD, (own_total_C1 - both_C1).exp_())
        log_total_C1 = both_C1
    grad_CD.sub_(head.pull_back_one(targets_C, of_target_C1), alpha=1.0 - smoothing)
    if smoothing:
        grad_CD.sub_(even_CD, alpha=smoothing)
    return (log_total_C1 - of_target_C1)[:, 0], (log_total_C1 - mean_C1)[:, 0], grad_CD.mul_(weight_C[:, None])


def _read_targets(of_target_C1: Tensor, logits_CV: Tensor, place_C1: Tensor) -> Tensor:
    """Return the targets' logits, those that lie in this part of the vocabulary read from it."""
    size = logits_CV.shape[1]
    is_here_C1 = (place_C1 >= 0) & (place_C1 < size)
    return torch.where(is_here_C1, logits_CV.gather(1, place_C1.clamp(0, size - 1)), of_target_C1)


def _counts_passes(device: str) -> bool:
    """Tell whether passes over logits cost more than what is computed in them: on a GPU, which caches none of them."""
    return device == "cuda"


def _in_few_passes(
    head: OutputHead, hidden_CD: Tensor, targets_C: Tensor, weight_C: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`chunk_gradient` does, of the whole vocabulary at once; what is padding has a share of zero.

    A GPU's memory is passed over three times: a softmax that reads 16 bits and writes 32 (torch copies bf16 first), the
    exponential in place, and the product with the targets' weights that writes 16 again.
    """
    own, target_C1 = slice(0, head.vocabulary), targets_C[:, None]
    log_share_CV = nn.functional.log_softmax(head.products(hidden_CD), 1, dtype=weight_C.dtype)
    nats_C = -log_share_CV.gather(1, target_C1)[:, 0]
    smooth_C = -log_share_CV[:, own].mean(1) if smoothing else nats_C
    share_CV = log_share_CV.exp_()
    share_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, smoothing - 1.0, dtype=share_CV.dtype))
    if smoothing:
        share_CV[:, own] -= smoothing / head.vocabulary
    grad_CV = torch.empty_like(share_CV, dtype=hidden_CD.dtype)
    torch.mul(share_CV, weight_C[:, None], out=grad_CV)
    return nats_C, smooth_C, linear(grad_CV, head.weight_VD.T)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type that losses are summed in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Tile(NamedTuple):
    """Of how many targets at most, and how much of the vocabulary, logits are held at a time."""

    rows: int
    vocabulary: int


def tile_of(device: str, vocabulary: int) -> Tile:
    """Return the logits that are held at a time on a kind of device."""
    if device == "cpu":
        return Tile(CPU_ROWS, CPU_VOCABULARY)
    return Tile(max(16, HELD_LOGITS.get(device, 1 << 24) // vocabulary), vocabulary)


def _chunks(num_targets: int, tile: Tile) -> list[slice]:
    """Cut the targets into chunks of about one size: a product of a few rows takes nearly as long as one of many."""
    num_chunks = max(1, -(-num_targets // tile.rows))
    ends = [num_targets * i // num_chunks for i in range(num_chunks + 1)]
    return list(starmap(slice, pairwise(ends)))
