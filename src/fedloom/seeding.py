"""Named random streams: every draw is a pure function of the run's seed and a name.

Two streams with different names are independent, so changing how often one is used (evaluating more often, say)
never changes another. Nothing here touches a global generator.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *name: str | int) -> int:
    """Return the 63-bit integer that belongs to ``seed`` and ``name``, e.g. ``derive(1, "clients", 7)``."""
    digest = hashlib.sha256("\x1f".join([str(seed), *map(str, name)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return the NumPy generator of a named stream."""
    return np.random.Generator(np.random.PCG64(derive(seed, *name)))


def torch_stream(seed: int, *name: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the torch generator of a named stream on ``device``."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *name))
