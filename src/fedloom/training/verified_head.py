"""A causal LM's output head, after checking that what it does behind fedloom's own passes is what the model does.

Letters: S rows of hidden states, D width, V vocabulary, T tokens of a row.
"""

from __future__ import annotations

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
from fedloom.training.output_head import OutputHead, read_output_head
from fedloom.training.row_passes import row_passes

PROBE_LENGTHS = (7, 4)
"""Tokens of the two rows with which a pass is compared with the model's own forward of each row alone."""

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
        head = read_output_head(model).aligned(model.device.type)
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
