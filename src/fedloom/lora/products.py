"""Matrix products of 16-bit numbers: in fp32 on a CPU that has no units for them, and rounded once at the end.

torch multiplies them one by one there: at 0.5 to 4 GFLOP/s on a core that does 33 in fp32. Copies in fp32 live for one
product; what is kept for backward has 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_UNITS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""What torch's library of products tells about this processor, by type."""

_META_IS: ContextVar[str] = ContextVar("_META_IS", default="meta")


def product_type(x: Tensor) -> torch.dtype:
    """Return the type in which products with ``x`` are taken on its device: its own, or fp32."""
    return torch.float32 if is_half_on_cpu(x) and not has_units(x.dtype) else x.dtype


def is_half_on_cpu(x: Tensor) -> bool:
    """Tell whether a CPU has, or would have, these numbers of 16 bits."""
    return x.dtype in _UNITS and (_META_IS.get() if x.is_meta else x.device.type) == "cpu"


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Tell whether this CPU multiplies matrices of a type at once, as it does but for some of 16 bits."""
    if dtype not in _UNITS:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, _UNITS[dtype])())
    except (AttributeError, RuntimeError):  # a torch without that library
        return False


@contextmanager
def meta_is(device: str) -> Iterator[None]:
    """Let tensors without numbers be multiplied as those on a kind of device, so that what it holds can be watched."""
    before = _META_IS.set(device)
    try:
        yield
    finally:
        _META_IS.reset(before)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in the type of ``left``."""
    dtype = product_type(left)
    return (left.to(dtype) @ right.to(dtype)).to(left.dtype)


def added_product(sum_NO: Tensor, left_NK: Tensor, right_KO: Tensor) -> Tensor:
    """Return ``sum + left @ right`` in the type of the sum."""
    dtype = product_type(left_NK)
    return torch.addmm(sum_NO.to(dtype), left_NK.to(dtype), right_KO.to(dtype)).to(sum_NO.dtype)


def affine(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + bias`` in the type of ``x``."""
    dtype = product_type(x)
    bias_O = None if bias_O is None else bias_O.to(dtype)
    return functional.linear(x.to(dtype), weight_OI.to(dtype), bias_O).to(x.dtype)


def frozen_affine(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return :func:`affine` of a frozen weight and bias; backward keeps neither ``x`` nor a copy of the weight."""
    found: Tensor = _FrozenAffine.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return found


class _FrozenAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return affine(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight_OI,) = ctx.saved_tensors
        return product(grads[0], weight_OI), None, None
