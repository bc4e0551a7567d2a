"""A slot's parameters by name, and which factor of an effective pair each is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair


def factor_names(lora: LoRAModel) -> list[str]:
    """Name a slot's factors in the order of ``LoRAModel.parameters``."""
    return [f"{module}.{factor}" for module in lora.shapes for factor in ("a_RI", "bt_RO")]


def factor_of(name: str) -> str:
    """Return ``a`` or ``b``, the factor that a slot's parameter holds."""
    return name.rpartition(".")[2][0]


def gradient_of(factors: Mapping[str, nn.Parameter], scale: float) -> Adapter:
    """Return the gradient at the effective factors: the slot's ``bt`` is ``bᵀ`` over the scale."""
    grads = {name: factor.grad for name, factor in factors.items() if factor.grad is not None}
    return Adapter(
        {
            module: Pair((grads[f"{module}.bt_RO"].T / scale).contiguous().cpu(), grads[f"{module}.a_RI"].cpu().clone())
            for module in dict.fromkeys(name.rpartition(".")[0] for name in factors)
        }
    )
