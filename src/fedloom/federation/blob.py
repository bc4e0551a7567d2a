"""A message as one safetensors blob and a hash of it: tensors in the wire's dtype, numbers in the header.

The hash is read first, the header next, the tensors last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.federation.buffers import Buffer, Buffers

NUMBERS_CHARACTERS = 512
"""Room for an update's numbers as JSON; where it is too little, twice or thrice as much is used.

Numbers are padded with blanks to this, so that a message's length depends on shapes and types alone and not on how many
digits a loss or a time happens to have: ``describe`` can then state the bytes before a run, and a test can compare them
to the bytes sent.
"""
MAX_HEADER_BYTES = 1 << 16
"""A header's fixed part; each tensor may add ``MAX_ENTRY_BYTES``."""
MAX_ENTRY_BYTES = 1 << 10
SEAL_BYTES = 16
"""A message ends with the first so many bytes of the SHA-256 of all that is before them."""


class WireDtype(StrEnum):
    """The type of numbers on the wire: floating-point numbers, or codes of few bits (:mod:`.coding`)."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @property
    def is_coded(self) -> bool:
        """Whether numbers are whole multiples of a slot's scale."""
        return self.value.startswith("int")

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return int(self.value.lstrip("bfpint"))

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype of that name; of codes, there is none."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


SAFETENSORS_NAMES = {WireDtype.FP32: "F32", WireDtype.BF16: "BF16", WireDtype.FP16: "F16"}
CODES_NAME = "U8"
"""Of bytes that hold codes."""
_DTYPES = {
    "F64": torch.float64,
    **{name: dtype.torch for dtype, name in SAFETENSORS_NAMES.items()},
    CODES_NAME: torch.uint8,
}
"""In the order in which safetensors puts tensors of different types."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pack(tensors: Mapping[str, Tensor], head: BaseModel) -> bytes:
    """Return a message of tensors, as they are, and numbers."""
    return b"".join(packed(tensors, head))


def packed(tensors: Mapping[str, Tensor], head: BaseModel) -> Buffers:
    """Return the message in several buffers, of which the tensors' own memory is most.

    Joined, and without the hash, they are the very bytes that safetensors writes.
    """
    text = head.model_dump_json()
    room = -(-len(text) // NUMBERS_CHARACTERS) * NUMBERS_CHARACTERS
    header: dict[str, Any] = {"__metadata__": {"message": text.ljust(room)}}
    parts: Buffers = [b""]
    offset = 0
    order = list(_NAMES)
    for key, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        parts.append(_memory_of(tensor))
        offset = end
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    parts[0] = len(encoded).to_bytes(8, "little") + encoded
    return [*parts, _seal(parts)]


def _memory_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data  # it keeps the memory alive


def sealed(blob: bytes) -> bytes:
    """Return a blob with its hash behind it: what was changed on the way is found, whoever sent it."""
    return blob + _seal([blob])


@dataclass(frozen=True)
class Checked:
    """A message whose hash was compared where it came in; who reads it afterwards need not do so again."""

    message: Buffer

    def __len__(self) -> int:
        return len(self.message)

    def __bytes__(self) -> bytes:
        return bytes(self.message)


Message = Buffer | Checked


def checked(message: Buffer) -> Checked:
    """Compare a message with the hash that it ends with, before anything of it is parsed.

    Raises:
        UpdateError: the hash is not its own.
    """
    whole = memoryview(message)
    if len(whole) < SEAL_BYTES or _seal([whole[:-SEAL_BYTES]]) != whole[-SEAL_BYTES:]:
        raise UpdateError(
            f"expected a whole message, got {len(message)} bytes that do not have the hash they end with (empty, cut "
            "or changed on the way); send it again, with the same version of fedloom on both sides"
        )
    return Checked(whole)


def blob_in(message: Message) -> memoryview:
    """Return the blob of a message, where it lies.

    Raises:
        UpdateError: the hash behind it is not its own.
    """
    return memoryview((message if isinstance(message, Checked) else checked(message)).message)[:-SEAL_BYTES]


def unsealed(message: Message) -> bytes:
    """Return a copy of the blob of a message.

    Raises:
        UpdateError: the hash behind it is not its own.
    """
    return bytes(blob_in(message))


def _seal(parts: Iterable[Buffer]) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()[:SEAL_BYTES]


def largest_message(num_tensors: int, num_bytes: int) -> int:
    """Return the most bytes that a message of so many tensors, of so many bytes together, can have."""
    return 8 + MAX_HEADER_BYTES + num_tensors * MAX_ENTRY_BYTES + num_bytes + SEAL_BYTES


def check_size(blob: Message, largest: int) -> None:
    """Refuse a message that is longer than what was asked for can be, before any of it is parsed.

    Raises:
        UpdateError: saying both lengths.
    """
    if len(blob) > largest:
        raise UpdateError(
            f"expected a message of at most {largest} bytes, got {len(blob)}; send what was asked and no more"
        )


def read_head(
    blob: Buffer, schema: TypeAdapter[Any], room: int, name: str = "message"
) -> tuple[Any, dict[str, tuple[str, tuple[int, ...]]]]:
    """Return a message's numbers, and (dtype, shape) of each of its tensors, none of which is made yet.

    ``blob`` is without its hash; ``room`` are the bytes that the entries of tensors may take in the header; ``name`` is
    that of the numbers in it.

    Raises:
        UpdateError: if the header is not whole, is larger than it can be, or its numbers do not fit the schema.
    """
    length = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or length > min(len(blob) - 8, MAX_HEADER_BYTES + room):
        raise UpdateError(
            f"expected a whole message, got {len(blob)} bytes that do not parse (empty or damaged); send it again"
        )
    try:
        header = json.loads(str(blob[8 : 8 + length], "utf-8"), object_pairs_hook=_once)
        text = header.pop("__metadata__")[name]
        entries = {key: (_entry(entry["dtype"], str), _entry(entry["shape"], list)) for key, entry in header.items()}
        json.loads(text, object_pairs_hook=_once)
        return schema.validate_json(text), {key: (dtype, tuple(shape)) for key, (dtype, shape) in entries.items()}
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "message"
        raise UpdateError(
            f"{where}: expected a number or text of this form, got one that does not fit ({first['msg'].lower()}); "
            "run the same version of fedloom on both sides"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UpdateError(
            f"expected a whole message, got {len(blob)} bytes that do not parse ({type(error).__name__}); send it again"
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; a key that comes twice would be read as one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _entry(value: Any, kind: type[Any]) -> Any:
    """Return a part of a tensor's entry; whole numbers of another type (``true``, ``4.0``) are none."""
    if not isinstance(value, kind) or (kind is list and not all(type(size) is int for size in value)):
        raise TypeError("an entry is of another form")
    return value


def check_entries(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Refuse a message whose tensors are not exactly those expected, in names, dtypes and shapes.

    Raises:
        UpdateError: naming the first that differs.
    """
    lacking, foreign = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if lacking or foreign:
        what = f"one without {lacking[0]}" if lacking else f"one with the unknown {foreign[0][:100]}"
        raise UpdateError(
            f"expected an update of {len(expected)} tensors of this base's modules, got {what}; use the run's own base "
            "and model.target_modules"
        )
    for key, (dtype, shape) in entries.items():
        if (dtype, shape) != expected[key]:
            wanted, got = f"{expected[key][0]} of shape {expected[key][1]}", f"{dtype[:20]} of shape {str(shape)[:60]}"
            raise UpdateError(f"{key}: expected {wanted}, got {got}; use the run's own base and recipe")


def read_tensors(blob: Buffer) -> dict[str, Tensor]:
    """Return a message's tensors in fp32, codes as they are, in memory of their own.

    Raises:
        UpdateError: if it is cut short or its offsets do not fit.
    """
    try:
        found = _tensors_in(memoryview(blob))
        return {key: t if t.dtype is torch.uint8 else t.to(torch.float32) for key, t in found.items()}
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise UpdateError(
            f"expected a whole safetensors message, got {len(blob)} bytes that do not parse ({error}); send it again"
        ) from error


def _tensors_in(blob: memoryview) -> dict[str, Tensor]:
    """Read tensors, which must fill the blob without a gap, in the order of their offsets."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(str(blob[8 : 8 + length], "utf-8"))
    header.pop("__metadata__", None)
    data, end = blob[8 + length :], 0
    found: dict[str, Tensor] = {}
    for key, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, stop = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
            raise ValueError("a shape or an offset is not whole")
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or stop > len(data):
            raise ValueError("shapes and offsets do not fit")
        found[key] = torch.empty(shape, dtype=dtype)
        if stop > begin:
            _memory_of(found[key])[:] = data[begin:stop]
        end = stop
    if end != len(data):
        raise ValueError("bytes are left over")
    return found
