"""Attention inside every sample of a pass in one call, without padding: torch's flash attention for varying lengths.

It exists for CUDA from Ampere on, in bf16 and fp16, from torch 2.10 or 2.11 on; where it is absent samples share calls
in buckets (:mod:`fedloom.training.attention`).

Letters: T tokens, N samples, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_WIDTH, WIDTH_STEP, FIRST_CAPABILITY = 256, 8, (8, 0)
"""Head widths that the kernel takes, and the first devices that it runs on."""


class _Flash(NamedTuple):
    """Torch's function, and whether it lets query heads share key heads."""

    attend: Callable[..., Any]
    shares_keys: bool


def runs_at_once(query_1HTE: Tensor) -> bool:
    """Tell whether one call can serve all samples of these queries."""
    width, dtype = query_1HTE.shape[-1], query_1HTE.dtype
    if not query_1HTE.is_cuda or dtype not in (torch.bfloat16, torch.float16):
        return False
    return width <= MOST_WIDTH and width % WIDTH_STEP == 0 and _is_able(query_1HTE.device) and _flash() is not None


def attend_at_once(
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    bounds_N1: Tensor,
    longest: int,
    *,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """Return (1, T, H, E): causal attention inside samples that begin and end at ``bounds_N1`` (N + 1, int32)."""
    flash = _flash()
    assert flash is not None
    query, key, value = (t[0].transpose(0, 1) for t in (query_1HTE, key_1GTE, value_1GTE))
    shared = query.shape[1] // key.shape[1]
    extra = {}
    if shared > 1 and flash.shares_keys:
        extra = {"enable_gqa": True}
    elif shared > 1:
        key, value = (t.repeat_interleave(shared, 1) for t in (key, value))
    seen = (-1 if sliding_window is None else sliding_window - 1, 0)
    ends = (bounds_N1, bounds_N1, longest, longest)
    attended_THE: Tensor = flash.attend(query, key, value, *ends, scale=scaling, window_size=seen, **extra)
    return attended_THE[None]


@cache
def _flash() -> _Flash | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    # The first version said causal, and had no scale and no window.
    return _Flash(varlen_attn, "enable_gqa" in known) if {"scale", "window_size"} <= known.keys() else None


@cache
def _is_able(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
