"""What a client keeps from one round to the next, and its one codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from safetensors.torch import load, save
from torch import Tensor

from fedloom.lora.algebra import truncate_pair
from fedloom.lora.pair import Adapter

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Memory:
    """What a client keeps; never changed, only replaced.

    Attributes:
        version: of the side that it holds.
        start: the factors it last started from, where not all of them cross every time.
        own: its own factors, where the method leaves some with the client.
        moments: of its optimiser, where they are its own.
        owed: what the wire rounded off its last update, where it owes that.
        control: how far its own steps carried it the last time, where that corrects the next.
    """

    version: int = 0
    start: Tensors = field(default_factory=dict)
    own: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    owed: Tensors = field(default_factory=dict)
    control: Tensors = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but the side to remember."""
        return not any(getattr(self, part) for part in _PARTS)


_PARTS = ("start", "own", "moments", "owed", "control")


def own_adapters(memories: Mapping[int, Memory], shared: Adapter | None = None) -> dict[int, Adapter]:
    """Return every client's own adapter: the factors that it keeps, completed by the ``shared`` ones at its rank."""
    kept = {c: {**_completing(memory.own, shared), **memory.own} for c, memory in sorted(memories.items())}
    return {
        client: Adapter.from_tensors(own)
        for client, own in kept.items()
        if any(key.endswith(".a") for key in own) and any(key.endswith(".b") for key in own)
    }


def _completing(own: Tensors, shared: Adapter | None) -> dict[str, Tensor]:
    """Return of the shared factors the slots that a client's own factors have."""
    slots = {key[:-2]: tensor.shape[1] if key.endswith(".b") else tensor.shape[0] for key, tensor in own.items()}
    cut = {name: truncate_pair(pair, slots[name]) for name, pair in (shared or Adapter()).items() if name in slots}
    return Adapter(cut).as_tensors()


def encode_memories(memories: Mapping[int, Memory]) -> bytes | None:
    """Return what clients keep besides their side, as safetensors; None where that is nothing."""
    flat = {
        f"{client}/{part}/{key}": tensor.contiguous().clone()
        for client, memory in memories.items()
        for part in _PARTS
        for key, tensor in getattr(memory, part).items()
    }
    return save(flat) if flat else None


def decode_memories(blob: bytes) -> dict[int, Memory]:
    """Rebuild memories; a memory holds no side until its client is given one.

    Raises:
        SafetensorError, ValueError, TypeError: it is not what :func:`encode_memories` writes.
    """
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in load(blob).items():
        client, part, key = name.split("/", 2)
        found.setdefault(int(client), {}).setdefault(part, {})[key] = tensor
    return {client: Memory(**parts) for client, parts in found.items()}  # type: ignore[arg-type]
