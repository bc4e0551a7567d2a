"""A server's state as files: tensors in safetensors, numbers in JSON, both to the last bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import RunError
from fedloom.lora.pair import Adapter
from fedloom.methods.state import ServerState

TENSORS, NUMBERS, OPTIMISERS = "state/server.safetensors", "state/server.json", "state/optimisers.safetensors"
_ADAPTERS = ("side", "start", "velocity", "residual")


def state_files(state: ServerState, optimisers: Mapping[int, Mapping[str, Tensor]] | None = None) -> dict[str, bytes]:
    """Return a state as named files; optimisers too where they persist between rounds."""
    parts = {name: getattr(state, name) for name in _ADAPTERS if getattr(state, name)}
    parts |= {f"chain/{position}": part for position, part in enumerate(state.chain)}
    parts |= {f"own/{client}": part for client, part in state.own.items()}
    numbers = {
        "round": state.round,
        "has_start": state.start is not None,
        "chain": len(state.chain),
        "own": list(state.own),
        "seen": {str(client): version for client, version in state.seen.items()},
        "typical_norm": state.typical_norm,
    }
    files = {TENSORS: save(_flat(parts)), NUMBERS: json.dumps(numbers).encode()}
    if optimisers:
        flat = {f"{client}/{key}": t.contiguous() for client, held in optimisers.items() for key, t in held.items()}
        files[OPTIMISERS] = save(flat)
    return files


@contextmanager
def damage_named(round_folder: Path) -> Iterator[None]:
    """Turn a state that cannot be rebuilt into one line that names the round and the way on.

    Raises:
        RunError: the block met a file that is not what a run writes.
    """
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{round_folder}: its state is damaged ({str(error).splitlines()[0]}); remove {round_folder} to go on from "
            "the round before, whose state is kept, or start over with --fresh"
        ) from error


def read_state(tensors: bytes, numbers: bytes) -> ServerState:
    """Rebuild a state from its files."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load(tensors).items():
        part, _, name = key.rpartition("/")
        grouped.setdefault(part, {})[name] = tensor
    parts = {part: Adapter.from_tensors(found) for part, found in grouped.items()}
    saved = json.loads(numbers)
    nothing = Adapter()
    return ServerState(
        round=saved["round"],
        side=parts.get("side", nothing),
        start=parts.get("start", nothing) if saved["has_start"] else None,
        chain=tuple(parts.get(f"chain/{position}", nothing) for position in range(saved["chain"])),
        seen={int(client): version for client, version in saved["seen"].items()},
        velocity=parts.get("velocity", nothing),
        residual=parts.get("residual", nothing),
        own={client: parts[f"own/{client}"] for client in saved["own"]},
        typical_norm=saved["typical_norm"],
    )


def read_optimisers(blob: bytes) -> dict[int, dict[str, Tensor]]:
    """Rebuild the optimisers' states, by client."""
    optimisers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load(blob).items():
        client, _, name = key.partition("/")
        optimisers.setdefault(int(client), {})[name] = tensor
    return optimisers


def _flat(parts: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Name every factor; copies, since a state may hold one tensor in two places and a file may not."""
    return {f"{p}/{key}": t.clone() for p, adapter in parts.items() for key, t in adapter.as_tensors().items()}
