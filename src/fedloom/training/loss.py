"""Cross-entropy on supervised tokens only, never holding more than a chunk of logits.

The gradient with respect to the hidden states is computed together with the loss, chunk by chunk; the head is frozen,
so its weight needs none. With K clients in a pass each target carries a weight, one over its client's number of
targets in the batch, so that the sum is the sum of the clients' mean losses.

Letters: S supervised targets, C targets of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.lora.linear import LoRALinear
from fedloom.models.families import model_type
from fedloom.models.foreign_forward import foreign_forward
from fedloom.models.quantized_layers import is_quantized
from fedloom.models.row_attention import Attention, attention_of, choose_attention
from fedloom.training.output_head import OutputHead, linear, read_output_head
from fedloom.training.row_passes import row_passes

CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits held at a time, if so many rows of them suffice: what stays in a CPU's cache; what keeps a GPU busy."""

CHUNK_ROWS, MOST_LOGITS = 192, 1 << 24
"""Rows held at a time at least, as far as so many logits allow: a chunk reads the head's weight twice."""

PROBE_LENGTHS = (7, 4)
"""Tokens of the two rows with which a pass is compared with the model's own forward of each row alone."""


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
    with torch.no_grad():
        for part in _chunks(hidden_SD, head):
            logits_CV = head.logits(hidden_SD[part])
            target_C1 = targets_S[part, None]
            nats_S[part] = logits_CV.logsumexp(1) - logits_CV.gather(1, target_C1)[:, 0]
    return nats_S


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient in one sweep over chunks of targets."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, head: OutputHead, targets_S: Tensor, weights_S: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        # The gradient is computed in the forward pass, while a chunk's logits exist: backward would need all again.
        grad_SD = torch.empty_like(hidden_SD)
        nats_S = torch.empty(targets_S.shape, dtype=accumulator(hidden_SD.dtype), device=hidden_SD.device)
        loss = nats_S.new_zeros(())
        few_passes = head.is_plain and _counts_passes(hidden_SD)
        for part in _chunks(hidden_SD, head):
            weight_C = weights_S[part].to(nats_S.dtype)
            if few_passes:
                nats_C, smooth_C, grad_CV = _in_few_passes(head, hidden_SD[part], targets_S[part], weight_C, smoothing)
                grad_SD[part] = linear(grad_CV, head.weight_VD.T)
            else:
                logits_CV = head.logits(hidden_SD[part])
                nats_C, smooth_C, grad_CV = _loss_and_gradient(logits_CV, targets_S[part], smoothing, head)
                grad_SD[part] = head.pull_back(grad_CV.mul_(weight_C[:, None]), logits_CV)
            loss += weight_C @ ((1.0 - smoothing) * nats_C + smoothing * smooth_C)
            nats_S[part] = nats_C
        ctx.save_for_backward(grad_SD)
        ctx.mark_non_differentiable(nats_S)
        return loss, nats_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_SD,) = ctx.saved_tensors
        return grad_SD * grads[0].to(grad_SD.dtype), None, None, None, None


def _loss_and_gradient(
    logits_CV: Tensor, targets_C: Tensor, smoothing: float, head: OutputHead
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nll (C,), mean −log p over the vocabulary (C,) and the gradient at the logits (C, V).

    The gradient ``p − (1 − ε)·onehot − ε/V`` takes the logits' place unless a softcap still needs them.
    """
    target_C1 = targets_C[:, None]
    top_C1 = logits_CV.amax(1, keepdim=True)
    of_target_C1 = logits_CV.gather(1, target_C1)
    mean_C1 = logits_CV.mean(1, keepdim=True) if smoothing else of_target_C1
    # In place where possible, since a chunk of logits is the largest tensor here; pull_back needs the softcapped ones.
    shifted_CV = logits_CV - top_C1 if head.softcap is not None else logits_CV.sub_(top_C1)
    share_CV = shifted_CV.exp_()
    total_C1 = share_CV.sum(1, keepdim=True)
    log_total_C1 = total_C1.log() + top_C1
    grad_CV = share_CV.div_(total_C1)
    grad_CV.scatter_add_(1, target_C1, torch.full_like(of_target_C1, smoothing - 1.0))
    if smoothing:
        grad_CV.sub_(smoothing / logits_CV.shape[1])
    return (log_total_C1 - of_target_C1)[:, 0], (log_total_C1 - mean_C1)[:, 0], grad_CV


def _counts_passes(hidden_SD: Tensor) -> bool:
    """Tell whether passes over logits cost more than what is computed in them: on a GPU, which caches no chunk."""
    return hidden_SD.is_cuda


def _in_few_passes(
    head: OutputHead, hidden_CD: Tensor, targets_C: Tensor, weight_C: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`_loss_and_gradient` does, the gradient weighed and in the weight's type, padding included.

    A GPU's memory is passed over three times: a softmax that reads 16 bits and writes 32, the exponential in place, and
    the product with the weights that writes 16 again. What is padding has a share of zero.
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
    return nats_C, smooth_C, grad_CV


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type that losses are summed in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(hidden_SD: Tensor, head: OutputHead) -> Iterator[slice]:
    size = chunk_rows(hidden_SD.device.type, head.vocabulary)
    return (slice(start, start + size) for start in range(0, hidden_SD.shape[0], size))


def chunk_rows(device: str, vocabulary: int) -> int:
    """Return of how many targets logits are held at a time on a kind of device."""
    held = CHUNK_LOGITS.get(device, MOST_LOGITS)
    return max(16, held // vocabulary, min(CHUNK_ROWS, MOST_LOGITS // vocabulary))


_VERIFIED: WeakKeyDictionary[nn.Module, dict[Attention, OutputHead]] = WeakKeyDictionary()


def output_head(model: Any) -> OutputHead:
    """Return a causal LM's output head, after checking that its passes give the model's own logits.

    The first call for a model, and for packed or padded rows, runs two short rows in one pass, and each alone the
    model's own way; this detects an unknown transformation of the logits, and layers that mix rows. No adapter may be
    routed then.

    Raises:
        ModelError: naming the family whose passes or head are not the model's own.
    """
    verified, attention = _VERIFIED.setdefault(model, {}), attention_of(model)
    if attention not in verified:
        head = read_output_head(model).aligned()
        _verify(model, _with_adapter(model, head))
        verified[attention] = head
    return _with_adapter(model, verified[attention])


def obstacle(model: Any, attention: Attention) -> str | None:
    """Return why a causal LM cannot train and be scored with packed, or with padded rows; None where it can.

    The model is left as it was chosen to attend. No adapter may be routed.
    """
    chosen = attention_of(model)
    choose_attention(model, attention)
    try:
        output_head(model)
    except ModelError as error:
        return str(error)
    finally:
        choose_attention(model, chosen)
    return None


def _with_adapter(model: Any, head: OutputHead) -> OutputHead:
    """Return the head with what an adapter on it adds at present, which changes with the adapter."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, LoRALinear):
        return head
    dtype = head.weight_VD.dtype
    return replace(head, weight_VD=layer.weight_OI(dtype), bias_V=layer.bias, side=layer.side_in(dtype), padding=0)


def not_finite(model: Any) -> str:
    """Say that a base's own logits are not finite, and what to do."""
    kind = str(model.dtype).removeprefix("torch.")
    found = f"model.base: expected finite logits of {model_type(model)!r}, got infinity or NaN in {kind}"
    if model.dtype == torch.float16:
        return f"{found}, whose largest number is 65504; set model.dtype = float32 or bfloat16"
    return f"{found}; check the weights, or choose another base"


@torch.no_grad()
def _verify(model: Any, head: OutputHead) -> None:
    vocabulary, device = head.vocabulary, head.weight_VD.device
    passes = row_passes(model)
    passes.check(model)
    # Two rows of different lengths, tokens spread by a prime: passes that mix rows or positions show.
    rows = [(np.arange(1, n + 1, dtype=np.int32) * 37 % vocabulary, np.ones(n, dtype=np.bool_)) for n in PROBE_LENGTHS]
    found: list[Tensor] = []
    for part in passes.split([[length] for length in PROBE_LENGTHS], sum(PROBE_LENGTHS) * len(PROBE_LENGTHS)):
        batch = passes.batch([rows[index] for index in part], device)
        found += passes.by_row(batch, head.logits(passes.hidden_states(model, batch)))
    tolerance = probe_tolerance(model)
    for logits_TV, (ids, _) in zip(found, rows, strict=True):
        row_BT = torch.from_numpy(ids).long().to(device)[None]
        with foreign_forward(model):
            own_TV = model(input_ids=row_BT, use_cache=False).logits[0]
        if not torch.isfinite(own_TV).all():
            raise ModelError(not_finite(model))
        error = (logits_TV - own_TV.to(logits_TV.dtype)).norm() / own_TV.norm().clamp_min(1e-30)
        if not error <= tolerance:
            raise ModelError(
                f"model.base: the {passes.name} forward of {model_type(model)!r} differs from the model's own by "
                f"{error:.1e}, expected at most {tolerance:.0e}: {type(model).__name__} has unknown layers or an "
                f"unknown head; {passes.advice}"
            )
    passes.prepare(model, tolerance)


def probe_tolerance(model: Any) -> float:
    """Return by how much two ways of computing a model's logits may differ, as a share of their norm."""
    is_exact = model.dtype in (torch.float32, torch.float64) and not is_quantized(model)
    return 1e-3 if is_exact else 5e-2
