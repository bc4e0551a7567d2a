"""What a completed round leaves: the server's state and what clients keep, as files of its folder and as a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedloom.assembly.split_run import NUMBERS as SPLIT_NUMBERS
from fedloom.assembly.split_run import TENSORS as SPLIT_TENSORS
from fedloom.assembly.split_run import read_split_state
from fedloom.clients.memory import Memory, decode_memories, encode_memories, own_adapters
from fedloom.methods.state import ServerState, Standing
from fedloom.methods.state_codec import NUMBERS, TENSORS, read_state, state_files
from fedloom.run_folder.contents import RoundFiles

CLIENTS = "state/clients.safetensors"


def round_files(state: ServerState, memories: Mapping[int, Memory]) -> dict[str, bytes]:
    """Return the files of a round's state; one for the clients only where they keep something."""
    kept = encode_memories(memories)
    return state_files(state) | ({} if kept is None else {CLIENTS: kept})


def read_round(files: RoundFiles) -> tuple[ServerState, dict[int, Memory]]:
    """Return the state in a round's folder and what its clients keep; they hold the side of that round.

    Raises:
        RunError: a file is not what was written.
        SafetensorError, KeyError, TypeError, ValueError: it is no state; see ``damage_named``.
    """
    state = read_state(files.read(TENSORS), files.read(NUMBERS))
    memories = decode_memories(files.read(CLIENTS)) if CLIENTS in files.hashes else {}
    return state, {client: replace(memory, version=state.round) for client, memory in memories.items()}


def standing_in(files: RoundFiles) -> Standing:
    """Return the model as the files of a round left it, whether it was cut or not.

    Raises:
        RunError: a file is not what was written.
        SafetensorError, KeyError, TypeError, ValueError: it is no state; see ``damage_named``.
    """
    if SPLIT_TENSORS in files.hashes:
        return read_split_state(files.read(SPLIT_TENSORS), files.read(SPLIT_NUMBERS)).standing()
    return standing_of(*read_round(files))


def standing_of(state: ServerState, memories: Mapping[int, Memory]) -> Standing:
    """Return the model as a round left it."""
    return Standing(state.round, state.global_adapter(), own_adapters(memories, state.start))
