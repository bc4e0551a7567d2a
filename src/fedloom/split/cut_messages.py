"""What crosses at every step of split training: activations and what the loss needs one way, gradients the other.

Nothing else does: no token ids of the prompt, no keys or values, no masks (positions follow from the samples' lengths),
and no labels where they stay with the client. A message is a flat record that is written as one safetensors blob with
its hash behind it; its ``num_bytes`` is their length, computed without writing them.

Letters: N samples, T tokens, D width, S supervised targets.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import UpdateError
from fedloom.federation.blob import MAX_ENTRY_BYTES, SEAL_BYTES, Message, largest_message, read_head, sealed, unsealed
from fedloom.split.codecs import Encoded

_MAX_COUNT = 1 << 53
Count = Annotated[int, Ge(0), Le(_MAX_COUNT)]
MessageKind = Literal["activations", "gradients", "hidden", "tail gradients"]

_ORDER = {"F64": 0, "F32": 1, "I32": 2, "BF16": 3, "F16": 4, "I8": 5}
"""safetensors lays tensors out by type, then by name; the header's length depends on it through the offsets."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
}

_DIMENSIONS = {"values_TD": 2, "scales_T": 1, "lengths_N": 1, "target_index_S": 1, "targets_S": 1}


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    kind: MessageKind
    client: Count
    step: Count
    micro_batch: Count
    num_loss_tokens: Count
    loss_nats: float


_NUMBERS: TypeAdapter[_Numbers] = TypeAdapter(_Numbers)


def largest_split_message(num_tokens: int, width: int) -> int:
    """Return the most bytes that a message of so many tokens can have, whatever it holds of each: fp32, all labels."""
    return largest_message(len(_DIMENSIONS), num_tokens * (4 * width + 4 * len(_DIMENSIONS)))


@dataclass(frozen=True, eq=False)
class SplitMessage:
    """A matrix (T, D) of one client at one step and micro-batch, either way.

    ``kind`` says which of the four transfers it is; only a U-shape has the last two. ``num_loss_tokens`` counts the
    supervised tokens of the client's whole step, by which losses are weighted; ``loss_nats`` is their sum in this
    micro-batch, given by whoever computed the loss. ``lengths_N`` comes with activations, ``target_index_S`` and
    ``targets_S`` only where the labels are the server's. The loss is written with as many digits whatever it is.
    """

    kind: MessageKind
    client: int
    step: int
    micro_batch: int
    matrix: Encoded
    num_loss_tokens: int = 0
    loss_nats: float = 0.0
    lengths_N: Tensor | None = None
    target_index_S: Tensor | None = None
    targets_S: Tensor | None = None

    _TENSORS: ClassVar[tuple[str, ...]] = ("lengths_N", "target_index_S", "targets_S")

    @property
    def num_tokens(self) -> int:
        """Tokens whose activations or gradients these are."""
        return self.matrix.values_TD.shape[0]

    @property
    def num_bytes(self) -> int:
        """Length of :meth:`to_bytes`, from shapes and types alone."""
        tensors, offset = self._tensors(), 0
        header: dict[str, object] = {"__metadata__": {"split": self._metadata()}}
        for name in sorted(tensors, key=lambda name: (_ORDER[_NAMES[tensors[name].dtype]], name)):
            tensor = tensors[name]
            span = [offset, offset + tensor.nbytes]
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
            offset = span[1]
        length = len(json.dumps(header, separators=(",", ":")))
        return 8 + length + (-length) % 8 + offset + SEAL_BYTES

    def to_bytes(self) -> bytes:
        """Write the message as one safetensors blob with its hash behind it."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self._tensors().items()}
        return sealed(save(tensors, metadata={"split": self._metadata()}))

    @classmethod
    def from_bytes(cls, message: Message) -> Self:
        """Read a message back.

        Raises:
            UpdateError: if the blob is not one; whether it is the one asked for is :mod:`.message_checks`'s to say.
        """
        blob = unsealed(message)
        head, entries = read_head(blob, _NUMBERS, len(_DIMENSIONS) * MAX_ENTRY_BYTES, "split")
        for name, (dtype, shape) in entries.items():
            if len(shape) != _DIMENSIONS.get(name) or dtype not in _ORDER:
                raise UpdateError(f"expected tensors of a split message, got {name[:40]} of {dtype[:20]}; resend it")
        try:
            tensors = load(blob)
            matrix = Encoded(tensors.pop("values_TD"), tensors.pop("scales_T", None))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UpdateError(f"expected a whole split message, got {len(blob)} bytes ({error}); resend it") from error
        return cls(matrix=matrix, **head.model_dump(), **tensors)  # type: ignore[arg-type]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"values_TD": self.matrix.values_TD}
        if self.matrix.scales_T is not None:
            tensors["scales_T"] = self.matrix.scales_T
        labels = {name: getattr(self, name) for name in self._TENSORS}
        return tensors | {name: tensor for name, tensor in labels.items() if tensor is not None}

    def _metadata(self) -> str:
        names = ("kind", "client", "step", "micro_batch", "num_loss_tokens")
        numbers = json.dumps({name: getattr(self, name) for name in names}, separators=(",", ":"))
        loss = f"{self.loss_nats: .16e}" if math.isfinite(self.loss_nats) else json.dumps(self.loss_nats)
        return f'{numbers[:-1]},"loss_nats":{loss}}}'
