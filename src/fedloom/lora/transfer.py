"""Many small tensors between devices in one transfer: each transfer waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of one dtype and device on another one, as parts of one copy; there already, they themselves."""
    if not tensors or tensors[0].device == device:
        return list(tensors)
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
