"""A worker on Ray: one resident base, and the clients it is asked for. All it is told is plain: JSON, numpy, bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.clients.memory import Memory, decode_memories, encode_memories
from fedloom.clients.shared_base import Asked, SharedBase
from fedloom.data.tokens import TokenSet
from fedloom.errors import ModelError
from fedloom.federation.blob import WireDtype
from fedloom.lora.pair import Adapter
from fedloom.training.row_losses import PassLosses, score_pass

Arrays = Mapping[str, NDArray[Any]]


@dataclass
class Station:
    """What a worker works with: a base with its clients, the wire's dtype, and what proves that it is the same here."""

    base: SharedBase
    dtype: WireDtype
    proof: Mapping[str, Any]


Furnish = Callable[[dict[str, Any], Sequence[NDArray[Any]]], Station]
"""From settings as plain values, and the rows and their owners as arrays, to a station."""


class Letter(NamedTuple):
    """A client's message or answer with its memory, all of it bytes; ``kept`` is None where it keeps no tensors.

    They travel as arrays: Ray writes these into shared memory once and reads them there, where it would copy bytes at
    each end.
    """

    client: int
    message: NDArray[np.uint8]
    version: int
    kept: NDArray[np.uint8] | None


class Unsuitable(NamedTuple):
    """In place of answers: why the base that all clients share cannot be trained."""

    reason: str


class Worker:
    """The actor. Calls come one at a time."""

    def __init__(self, furnish: Furnish, settings: dict[str, Any], *arrays: NDArray[Any]) -> None:
        self._station = furnish(settings, arrays)
        self._scored: tuple[str, Any] = ("", None)

    def greeting(self) -> dict[str, Any]:
        """Say what this worker is, for the driver to compare with itself."""
        return {**self._station.proof, "process": os.getpid(), "node": node_of_this_process()}

    def train(self, version: int, side: Sequence[Any], letters: Sequence[Letter]) -> list[Letter] | Unsuitable:
        """Let clients answer their messages; ``side`` holds a reference to the side of this version."""
        base = self._station.base
        if side:
            base.sides.hold(version, lambda: as_adapter(fetched(side[0])))
        if self._scored[0]:
            self._scored = ("", None)
            base.forget_side()
        asked = [Asked(one.client, one.message.data, opened(one)) for one in letters]
        try:
            answers = base.answers(asked, self._station.dtype)
        except ModelError as error:
            return Unsuitable(str(error))
        return [letter(one.client, answer.message, answer.memory) for one, answer in zip(letters, answers, strict=True)]

    def score(
        self, name: str, adapter: Sequence[Any], rows: Sequence[Any], passes: Sequence[Sequence[int]]
    ) -> list[PassLosses]:
        """Score passes of rows under an adapter; ``name`` tells adapters and rows apart from one call to the next."""
        lora = self._station.base.lora
        if self._scored[0] != name:
            lora.set_side(as_adapter(fetched(adapter[0])) or None)
            lora.route_all(None)
            self._scored = (name, TokenSet(*map(fetched, rows)))
        return [score_pass(lora, self._scored[1], members) for members in passes]


def fetched(reference: Any) -> Any:
    """Return what a reference leads to: on this machine, without a copy."""
    import ray

    return ray.get(reference)


def node_of_this_process() -> str:
    """Return the address of this machine in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def letter(client: int, message: bytes, memory: Memory) -> Letter:
    """Put a message and a client's memory into bytes."""
    kept = encode_memories({client: memory})
    carried = None if kept is None else np.frombuffer(kept, np.uint8)
    return Letter(client, np.frombuffer(message, np.uint8), memory.version, carried)


def opened(sent: Letter) -> Memory:
    """Return the memory in a letter."""
    memory = Memory() if sent.kept is None else decode_memories(sent.kept.tobytes())[sent.client]
    return replace(memory, version=sent.version)


def as_arrays(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """Return an adapter as arrays, which lie once on every machine."""
    return {key: tensor.cpu().numpy() for key, tensor in adapter.as_tensors().items()}


def as_adapter(arrays: Arrays) -> Adapter:
    """Return an adapter from arrays; it is a copy, for arrays of the store cannot be written to."""
    return Adapter.from_tensors({key: torch.from_numpy(np.array(array)) for key, array in arrays.items()})
