"""How many runs fit side by side into what is free, by the memory that is planned for each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fedloom.assembly.free_memory import free_on
from fedloom.config import Settings
from fedloom.data.sources import Rows
from fedloom.errors import FedloomError
from fedloom.preview.description import memory_of
from fedloom.preview.planned_memory import PlannedMemory
from fedloom.preview.row_sample import rows_here
from fedloom.wording import counted, written_bytes

PROCESS_BYTES = 600 << 20
"""Python with its libraries and a run's rows: processes that train stories3M or the embedded base were seen to have 490
to 710 MB resident, their plan's share included."""
SHARE_OF_FREE = 0.85
"""Of what is free, what runs may take: a plan may be too low by a seventh, and other programs go on."""


def runs_at_once(variants: Sequence[Settings], wanted: int) -> tuple[int, str | None]:
    """Return how many of these runs fit side by side, at most ``wanted``, and in words where that is fewer.

    One always may begin: whether that fits is said as for a run alone. So may all where no plan can be made.
    """
    if wanted == 1:
        return 1, None
    try:
        plans = list(_plans(_different(variants)))
    except FedloomError:  # each run says by itself what is in its way
        return wanted, None
    fitting, why = min(_fitting(variants[0].model.device, plans), key=lambda found: found[0])
    chosen = max(1, min(wanted, fitting))
    if chosen == wanted:
        return wanted, None
    return chosen, (
        f"--parallel: expected memory for {wanted} runs at once, {why}; {counted(chosen, 'run')} at once; for more "
        "lower training.token_budget, or free memory"
    )


def _different(variants: Sequence[Settings]) -> list[Settings]:
    """Return one of all variants that differ in nothing that a plan depends on."""
    found = {}
    for one in variants:
        tables = one.as_dict()
        tables.pop("run")
        tables["training"].pop("learning_rate")
        found[json.dumps(tables, sort_keys=True, default=str)] = one
    return list(found.values())


def _plans(variants: Sequence[Settings]) -> Iterator[PlannedMemory]:
    """Plan each; the same rows, which may be a million, are read once."""
    read: dict[tuple[Any, ...], Rows | None] = {}
    for one in variants:
        named = (one.data.path, one.data.split, one.data.subset, one.data.revision)
        if named not in read:
            read[named] = rows_here(one)
        yield memory_of(one, read[named])


def _fitting(device: str, plans: Sequence[PlannedMemory]) -> list[tuple[int, str]]:
    """Return for each memory that runs share how many of the largest fit into it, and what was found."""
    on_gpu = plans[0].device == "cuda"
    here = PROCESS_BYTES + max(plan.base_bytes if on_gpu else plan.total_bytes for plan in plans)
    found = [_share(here, torch.device("cpu"), "this machine")]
    if on_gpu:
        gpu = torch.device("cuda" if device == "auto" else device)
        found.append(_share(max(plan.total_bytes for plan in plans), gpu, str(gpu)))
    return found


def _share(each: int, device: torch.device, place: str) -> tuple[int, str]:
    free = free_on(device)
    share = f"{SHARE_OF_FREE:.0%} of {written_bytes(free)} free on {place}"
    return int(SHARE_OF_FREE * free) // each, f"{written_bytes(each)} each, found {share}"
