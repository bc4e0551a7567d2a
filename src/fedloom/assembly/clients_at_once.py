"""How many clients train together: by the device, and on a GPU by its free memory.

Their number changes the result by rounding at most, so that it may differ from machine to machine.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.assembly.free_memory import free_on
from fedloom.config import Settings
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import rank_in
from fedloom.wording import counted, written_bytes

CLIENTS_AT_ONCE: Mapping[str, int] = {"cpu": 1, "mps": 1, "cuda": 16}
"""Adapters open together at most by device: a CPU is busy with one client's batch, a GPU is not."""
CLIENT_BYTES = 16
"""Per trained number of an open client: AdamW's two moments, the start and the answer; its pass holds the rest."""
SHARE_OF_FREE = 0.25
"""Of the memory that is free beside the base, what open clients may take: passes need the rest."""


def client_bytes(shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Return what an open client of this rank holds beside its share of a pass, by the shapes of its modules."""
    return CLIENT_BYTES * sum(rank_in(shape, rank) * sum(shape) for shape in shapes.values())


def clients_at_once(
    settings: Settings, device: str, shapes: Mapping[str, tuple[int, int]], free_bytes: int | None = None
) -> int:
    """Return how many clients are open together: what the settings say, else by the device and what is free on it."""
    if settings.engine.clients_at_once is not None:
        return settings.engine.clients_at_once
    most = CLIENTS_AT_ONCE[device]
    if free_bytes is None:
        return most
    return max(1, min(most, int(SHARE_OF_FREE * free_bytes) // client_bytes(shapes, max(settings.client_ranks))))


def clients_at_once_here(settings: Settings, lora: LoRAModel) -> tuple[int, str | None]:
    """Return how many clients are open together on the base's device, and in words that memory allows no more."""
    device = next(lora.model.parameters()).device
    free_bytes = free_on(device) if device.type == "cuda" else None  # elsewhere memory is not what limits
    chosen = clients_at_once(settings, device.type, lora.shapes, free_bytes)
    wanted = clients_at_once(settings, device.type, lora.shapes)
    if free_bytes is None or chosen >= min(wanted, settings.cohort_size):
        return chosen, None
    each = written_bytes(client_bytes(lora.shapes, max(settings.client_ranks)))
    return chosen, (
        f"{counted(chosen, 'client')} at once instead of {wanted}: each holds up to {each}, and "
        f"{written_bytes(free_bytes)} are free on {device}, of which a quarter is for them"
    )
