"""A slot's parameters by name, and which factor of an effective pair each is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.transfer import moved_together


def factor_names(lora: LoRAModel) -> list[str]:
    """Name a slot's factors in the order of ``LoRAModel.parameters``."""
    return [f"{module}.{factor}" for module in lora.shapes for factor in ("a_RI", "bt_RO")]


def factor_of(name: str) -> str:
    """Return ``a`` or ``b``, the factor that a slot's parameter holds."""
    return name.rpartition(".")[2][0]


def gradient_of(factors: Mapping[str, nn.Parameter], scale: float) -> Adapter:
    """Return the gradient at the effective factors: the slot's ``bt`` is ``bᵀ`` over the scale."""
    held = {name: factor.grad for name, factor in factors.items() if factor.grad is not None}
    grads = dict(zip(held, moved_together(list(held.values()), torch.device("cpu")), strict=True))
    return Adapter(
        {
            module: Pair((grads[f"{module}.bt_RO"].T / scale).contiguous(), grads[f"{module}.a_RI"].clone())
            for module in dict.fromkeys(name.rpartition(".")[0] for name in factors)
        }
    )
