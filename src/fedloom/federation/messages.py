"""What crosses between server and clients, as bytes: one safetensors blob a message, its numbers in the header.

The wire's dtype applies to every tensor that crosses, and only there: what arrives is fp32 again. A message's length
is the length of its blob; nothing else is counted and nothing else is sent. Numbers are filled up with blanks, so that
this length depends on shapes and types alone and not on how many digits a loss or a time happens to have.
"""

from __future__ import annotations

import json
from dataclasses import fields
from enum import StrEnum
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, Update

NUMBERS_CHARACTERS = 320
"""Room for a message's numbers as JSON; where it is too little, twice or thrice as much is used."""


class WireDtype(StrEnum):
    """The dtype of tensors on the wire."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of that name."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def as_received(adapter: Adapter, dtype: WireDtype) -> Adapter:
    """Return an adapter as the other side of the wire sees it: rounded to the wire's dtype."""
    return adapter if dtype is WireDtype.FP32 else adapter.to(dtype.torch).to(torch.float32)


def encode_broadcast(broadcast: Broadcast, dtype: WireDtype) -> bytes:
    """Serialise what crosses of a broadcast: its news, its start, and its numbers."""
    tensors = {f"news/{key}": tensor for key, tensor in broadcast.news.as_tensors().items()}
    start, draw = broadcast.start, None
    if isinstance(start, Draw):
        draw = {"name": list(start.name), "rank": start.rank}
    else:
        tensors |= {f"start/{key}": tensor for key, tensor in start.as_tensors().items()}
    numbers = {
        "round": broadcast.round,
        "client": broadcast.client,
        "rank": broadcast.rank,
        "scale": broadcast.scale,
        "since": broadcast.since,
        "draw": draw,
    }
    return _blob(tensors, numbers, dtype)


def decode_broadcast(blob: bytes, side: Adapter) -> Broadcast:
    """Rebuild a broadcast at a client that holds ``side`` once the news are in.

    Raises:
        UpdateError: if the blob is not a whole message.
    """
    tensors, numbers = _unblob(blob)
    parts: dict[str, dict[str, Tensor]] = {"news": {}, "start": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parts[kind][name] = tensor
    draw = numbers.pop("draw")
    news, sent = (Adapter.from_tensors(part) for part in parts.values())
    start = sent if draw is None else Draw(tuple(draw["name"]), draw["rank"])
    return Broadcast(side=side, news=news, start=start, **numbers)


def encode_update(update: Update, dtype: WireDtype) -> bytes:
    """Serialise an update."""
    return _blob(update.adapter.as_tensors(), numbers_of(update), dtype)


def decode_update(blob: bytes) -> Update:
    """Rebuild an update.

    Raises:
        UpdateError: if the blob is not a whole message.
    """
    tensors, numbers = _unblob(blob)
    return Update(adapter=Adapter.from_tensors(tensors), **numbers)


def numbers_of(update: Update) -> dict[str, Any]:
    """Return an update's numbers without its tensors."""
    return {f.name: getattr(update, f.name) for f in fields(update) if f.name != "adapter"}


def _blob(tensors: dict[str, Tensor], numbers: dict[str, Any], dtype: WireDtype) -> bytes:
    ready = {key: tensor.to(dtype.torch).contiguous() for key, tensor in tensors.items()}
    text = json.dumps(numbers)
    room = -(-len(text) // NUMBERS_CHARACTERS) * NUMBERS_CHARACTERS
    return save(ready, metadata={"message": text.ljust(room)})


def _unblob(blob: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = {key: tensor.to(torch.float32) for key, tensor in load(blob).items()}
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
        return tensors, json.loads(header["__metadata__"]["message"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise UpdateError(
            f"expected a whole safetensors message, got {len(blob)} bytes that do not parse ({error})"
        ) from error
