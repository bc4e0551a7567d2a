"""How many CPU threads compute a base: sums round by how they are divided, so the number is a setting and no guess."""

from __future__ import annotations

import torch


def compute_with(threads: int) -> None:
    """Let torch divide an operation among ``threads`` threads of this process, whatever the environment asks for."""
    torch.set_num_threads(threads)
