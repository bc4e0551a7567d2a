"""How numbers are written on the wire: in 32 or 16 bits each, or as few-bit codes with one scale a slot.

A slot is a row of A or a column of B. Its numbers x become whole numbers c of ``bits`` bits and one scale s:

    s = max |x| / top,   c = round(x / s),   top = 2^(bits − 1) − 1

The scale is rounded up to 12 significant bits. Then ``c · s`` is exact in fp32, and what was rounded once is written
again without any loss: whoever passes rounded numbers on changes none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.federation.blob import CODES_NAME, SAFETENSORS_NAMES, WireDtype
from fedloom.lora.pair import Adapter

Shapes2D = Mapping[str, tuple[int, int]]
Entries = dict[str, tuple[str, tuple[int, ...]]]
SCALE = ":scale"
"""Ends the name of a factor's scales; a module's name has no colon."""
_SCALE_LOW_BITS = 0xFFF
"""The bits of an fp32 mantissa beyond the first 12 significant ones."""


def rounded(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    """Return factors, named as in ``Adapter.as_tensors``, as the other side of the wire sees them; fp32."""
    if dtype is WireDtype.FP32:
        return dict(tensors)
    if not dtype.is_coded:
        return {key: tensor.to(dtype.torch).to(torch.float32) for key, tensor in tensors.items()}
    return {key: _from_codes(key, *_codes(key, tensor, dtype.bits)) for key, tensor in tensors.items()}


def as_received(adapter: Adapter, dtype: WireDtype) -> Adapter:
    """Return an adapter as the other side of the wire sees it: rounded to the wire's dtype."""
    return adapter if dtype is WireDtype.FP32 else adapter.with_factors(rounded(adapter.as_tensors(), dtype))


def written(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    """Return the tensors of a message that stand for factors."""
    if not dtype.is_coded:
        return {key: tensor.to(dtype.torch) for key, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        codes_RN, scale_R = _codes(key, tensor, dtype.bits)
        found |= {key: _packed(codes_RN, dtype.bits), key + SCALE: scale_R}
    return found


def written_exactly(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    """Return :func:`written` of each factor where that changes no number of it, and the others as they are."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        is_same = dtype is WireDtype.FP32 or torch.equal(rounded({key: tensor}, dtype)[key].to(tensor.dtype), tensor)
        found |= written({key: tensor}, dtype) if is_same and dtype is not WireDtype.FP32 else {key: tensor}
    return found


def entries_of(shapes: Shapes2D, dtype: WireDtype) -> Entries:
    """Return (dtype, shape) of every tensor of a message that stands for factors of these shapes."""
    if not dtype.is_coded:
        return {key: (SAFETENSORS_NAMES[dtype], shape) for key, shape in shapes.items()}
    found: Entries = {}
    for key, shape in shapes.items():
        slots, length = _slots_first(key, shape)
        num_bytes = -(-length * dtype.bits // 8)
        found |= {key: (CODES_NAME, (slots, num_bytes)), key + SCALE: ("F32", (slots,))}
    return found


def num_bytes_of(shapes: Shapes2D, dtype: WireDtype) -> int:
    """Return the bytes of the tensors that stand for factors of these shapes."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, CODES_NAME: 1}
    return sum(sizes[name] * prod(shape) for name, shape in entries_of(shapes, dtype).values())


def read(tensors: Mapping[str, Tensor], shapes: Shapes2D, dtype: WireDtype) -> dict[str, Tensor]:
    """Return the factors that a message's tensors stand for, whose entries are those of :func:`entries_of`; fp32.

    Raises:
        UpdateError: a code or a scale is none.
    """
    if not dtype.is_coded:
        return {key: tensors[key].to(torch.float32) for key in shapes}
    found: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        codes_RN = _unpacked(key, tensors[key], _slots_first(key, shape)[1], dtype.bits)
        scale_R = tensors[key + SCALE]
        if not bool((torch.isfinite(scale_R) & (scale_R >= 0)).all()):
            raise UpdateError(f"{key}: expected finite scales of 0 or more, got others; send it again")
        found[key] = _from_codes(key, codes_RN, scale_R)
    return found


def read_exactly(tensors: Mapping[str, Tensor], shapes: Shapes2D, dtype: WireDtype) -> dict[str, Tensor]:
    """Return the factors of :func:`written_exactly`.

    Raises:
        UpdateError: a code or a scale is none.
    """
    found: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        if key + SCALE in tensors:
            found |= read(tensors, {key: shape}, dtype)
        else:
            found[key] = tensors[key].to(torch.float32)
    return found


def _slots_first(key: str, shape: tuple[int, int]) -> tuple[int, int]:
    return shape if key.endswith(".a") else (shape[1], shape[0])


def _codes(key: str, tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return whole numbers (R, N) and scales (R,)."""
    slots_RN = (tensor if key.endswith(".a") else tensor.T).to(torch.float32)
    top = _top(bits)
    scale_R = _rounded_up(slots_RN.abs().amax(dim=1) / top)
    codes_RN = (slots_RN / scale_R.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-top, top)
    return codes_RN.to(torch.int8), scale_R


def _rounded_up(scale_R: Tensor) -> Tensor:
    """Round up to 12 significant bits; what is too small to be a normal number is zero."""
    normal_R = torch.where(scale_R < torch.finfo(torch.float32).tiny, 0.0, scale_R)
    return ((normal_R.view(torch.int32) + _SCALE_LOW_BITS) & ~_SCALE_LOW_BITS).view(torch.float32)


def _from_codes(key: str, codes_RN: Tensor, scale_R: Tensor) -> Tensor:
    numbers_RN = codes_RN.to(torch.float32) * scale_R[:, None]
    return numbers_RN if key.endswith(".a") else numbers_RN.T.contiguous()


def _top(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _packed(codes_RN: Tensor, bits: int) -> Tensor:
    """Write codes, moved up to begin at 0, several in a byte, the first in the lowest bits."""
    per_byte = 8 // bits
    moved_RN = (codes_RN.to(torch.int16) + _top(bits)).to(torch.uint8)
    filled_RN = torch.nn.functional.pad(moved_RN, (0, -moved_RN.shape[1] % per_byte))
    parts = filled_RN.reshape(len(filled_RN), filled_RN.shape[1] // per_byte, per_byte)
    found = torch.zeros(parts.shape[:2], dtype=torch.uint8, device=parts.device)
    for place in range(per_byte):
        found |= parts[:, :, place] << (place * bits)
    return found


def _unpacked(key: str, packed: Tensor, length: int, bits: int) -> Tensor:
    per_byte, mask = 8 // bits, (1 << bits) - 1
    places = [(packed >> (place * bits)) & mask for place in range(per_byte)]
    filled_RN = torch.stack(places, dim=-1).reshape(len(packed), packed.shape[1] * per_byte)
    codes_RN = filled_RN[:, :length].to(torch.int16) - _top(bits)
    if bool((codes_RN > _top(bits)).any()) or bool(filled_RN[:, length:].any()):
        raise UpdateError(f"{key}: expected codes of {bits} bits, got others; send it again")
    return codes_RN.to(torch.int8)
