"""A server's state as tensors and numbers, and as files: both to the last bit. Split training uses the same codec."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedloom.errors import AdapterError, RunError
from fedloom.lora.pair import Adapter
from fedloom.methods.state import ServerState

TENSORS, NUMBERS = "state/server.safetensors", "state/server.json"
_ADAPTERS = ("side", "start", "velocity", "residual")
_NAMED = ("moments", "optimiser", "control")

_MAX_CHAIN = 1 << 16
"""The latest additions that a state can hold: more would be made before it is seen that they are not there."""

Count = Annotated[int, Ge(0), Le(1 << 53)]


class _Numbers(BaseModel):
    """What of a state JSON can hold; runs of before wrote more, which is not read."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    round: Count
    has_start: bool
    chain: Annotated[int, Ge(0), Le(_MAX_CHAIN)]
    seen: dict[Annotated[str, Field(pattern=r"^-?[0-9]{1,18}$")], Count]
    typical_norm: Annotated[float, Ge(0)] | None
    views: list[Annotated[int, Ge(-1), Le(1 << 53)]] = []


def state_tensors(state: ServerState) -> dict[str, Tensor]:
    """Name every factor of a state; copies, since a state may hold one tensor in two places and a file may not."""
    parts = {name: getattr(state, name) for name in _ADAPTERS if getattr(state, name)}
    parts |= {f"chain/{position}": part for position, part in enumerate(state.chain)}
    parts |= {f"views/{client}": view for client, view in state.views.items()}
    tensors = {f"{p}/{key}": t.clone() for p, adapter in parts.items() for key, t in adapter.as_tensors().items()}
    kept = {part: getattr(state, part) for part in _NAMED}
    return tensors | {f"{part}/{key}": tensor.clone() for part, own in kept.items() for key, tensor in own.items()}


def state_numbers(state: ServerState) -> dict[str, Any]:
    """Return what of a state JSON can hold."""
    return {
        "round": state.round,
        "has_start": state.start is not None,
        "chain": len(state.chain),
        "seen": {str(client): version for client, version in state.seen.items()},
        "typical_norm": state.typical_norm,
        "views": list(state.views),
    }


def state_from(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> ServerState:
    """Rebuild a state from :func:`state_tensors` and :func:`state_numbers`.

    Raises:
        KeyError, TypeError, ValueError: a part is missing or of another form.
    """
    read = _read_numbers(numbers)
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.rpartition("/")
        grouped.setdefault(part, {})[name] = tensor
    named = {part: grouped.pop(part, {}) for part in _NAMED}
    parts = {part: Adapter.from_tensors(found) for part, found in grouped.items()}
    nothing = Adapter()
    return ServerState(
        round=read.round,
        side=parts.get("side", nothing),
        start=parts.get("start", nothing) if read.has_start else None,
        chain=tuple(parts.get(f"chain/{position}", nothing) for position in range(read.chain)),
        seen={int(client): version for client, version in read.seen.items()},
        velocity=parts.get("velocity", nothing),
        residual=parts.get("residual", nothing),
        typical_norm=read.typical_norm,
        views={client: parts[f"views/{client}"] for client in read.views},
        **named,
    )


def _read_numbers(numbers: Mapping[str, Any]) -> _Numbers:
    try:
        return _Numbers.model_validate(dict(numbers))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error


def state_files(state: ServerState) -> dict[str, bytes]:
    """Return a state as named files."""
    return {TENSORS: save(state_tensors(state)), NUMBERS: json.dumps(state_numbers(state)).encode()}


def read_state(tensors: bytes, numbers: bytes) -> ServerState:
    """Rebuild a state from its files."""
    return state_from(load(tensors), json.loads(numbers))


@contextmanager
def damage_named(round_folder: Path) -> Iterator[None]:
    """Turn a state that cannot be rebuilt into one line that names the round and the way on.

    Raises:
        RunError: the block met a file that is not what a run writes.
    """
    try:
        yield
    except (SafetensorError, AdapterError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{round_folder}: expected the state of a round, found a damaged one ({str(error).splitlines()[0]}); "
            "remove "
            f"{round_folder} to resume from the round before, whose state is kept, or start over with --fresh"
        ) from error
