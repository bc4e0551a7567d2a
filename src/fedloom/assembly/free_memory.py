"""What a process can still take: of a GPU's memory, or of this machine's, within what its control group may hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Limit and use of a control group of version 2 (which lists no controllers), and of version 1's memory controller."""


def free_on(device: torch.device) -> int:
    """Return the bytes that this process can still take on a GPU, or on any other device of this machine's memory."""
    if device.type != "cuda":
        return free_here()
    # What torch has reserved and does not use is free for this process, and would not be there after an earlier run.
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + idle


def free_here() -> int:
    """Return the bytes of memory that can still be taken here without swapping, or being killed in a container."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield what the control groups of this process leave it (Linux); files in the page cache give way."""
    for line in _OWN.read_text(encoding="utf-8").splitlines() if _OWN.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in _FILES:
            # In a container the path is often the host's, and its own group lies at the root.
            inner = _GROUPS / controllers / path.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(_GROUPS / controllers):
                    yield from _left_in(folder, *_FILES[controllers])


def _left_in(folder: Path, limit_file: str, use_file: str) -> Iterator[int]:
    try:
        limit = (folder / limit_file).read_text(encoding="utf-8").strip()
        used = int((folder / use_file).read_text(encoding="utf-8"))
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:  # no such group is seen from here, or the root of version 2, which has no limit
        return
    if limit != "max":
        held = dict(line.split(maxsplit=1) for line in lines)
        cached = int(held.get("total_inactive_file", held.get("inactive_file", 0)))
        yield max(0, int(limit) - max(0, used - cached))
