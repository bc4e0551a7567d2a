"""What a completed round leaves: the server's state and what clients keep, as files of its folder and as a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from fedloom.clients.memory import Memory, decode_memories, encode_memories, own_adapters
from fedloom.methods.state import ServerState, Standing
from fedloom.methods.state_codec import NUMBERS, TENSORS, read_state, state_files

CLIENTS = "state/clients.safetensors"
FORMER_OPTIMISERS = "state/optimisers.safetensors"
"""Where runs before ``CLIENTS`` kept moments; own adapters were in the server's file then, under ``own/``."""


def round_files(state: ServerState, memories: Mapping[int, Memory]) -> dict[str, bytes]:
    """Return the files of a round's state; one for the clients only where they keep something."""
    kept = encode_memories(memories)
    return state_files(state) | ({} if kept is None else {CLIENTS: kept})


def read_round(folder: Path) -> tuple[ServerState, dict[int, Memory]]:
    """Return the state in a round's folder and what its clients keep; they hold the side of that round.

    Raises:
        SafetensorError, KeyError, TypeError, ValueError: a file is damaged; see ``damage_named``.
    """
    tensors = (folder / TENSORS).read_bytes()
    state = read_state(tensors, (folder / NUMBERS).read_bytes())
    memories = decode_memories((folder / CLIENTS).read_bytes()) if (folder / CLIENTS).exists() else {}
    if not memories:
        memories = _former(tensors, folder / FORMER_OPTIMISERS)
    return state, {client: replace(memory, version=state.round) for client, memory in memories.items()}


def standing_of(state: ServerState, memories: Mapping[int, Memory]) -> Standing:
    """Return the model as a round left it."""
    return Standing(state.round, state.global_adapter(), own_adapters(memories))


def _former(tensors: bytes, optimisers: Path) -> dict[int, Memory]:
    """Read own adapters and moments as runs wrote them before clients had a file of their own."""
    own: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load(tensors).items():
        kind, _, rest = name.partition("/")
        if kind == "own":
            client, _, key = rest.partition("/")
            own.setdefault(int(client), {})[key] = tensor
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in (load(optimisers.read_bytes()) if optimisers.exists() else {}).items():
        client, _, key = name.partition("/")
        moments.setdefault(int(client), {})[key] = tensor
    return {client: Memory(own=factors, moments=moments.get(client, {})) for client, factors in own.items()}
