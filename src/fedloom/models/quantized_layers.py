"""Quantised layers that no adapter touches: gradients must still pass through them."""

from __future__ import annotations

from typing import Any

import torch

from fedloom.errors import ModelError
from fedloom.models.stored_quantization import UNQUANTISED
from fedloom.wording import first_line

_PACKS_FOR_INFERENCE = "support_avx512bf16_for_cpu"
"""bitsandbytes' flag of a 4-bit layer that, on some CPUs, puts its weight in a layout for inference at its first pass
without gradients. From then on its result has no gradient, and everything below it trains wrongly without a word."""


def is_quantized(model: Any) -> bool:
    """Whether a base's layers are quantised, by us or as it is stored."""
    return getattr(model.config, "quantization_config", None) is not None


def keep_trainable(model: Any) -> None:
    """Keep every quantised layer in the form that has a gradient, and check one of each kind.

    Raises:
        ModelError: naming a layer whose result has no gradient, or that does not run: its weights are not what the
            model's configuration says.
    """
    checked: set[type] = set()
    for name, module in model.named_modules():
        if hasattr(module, _PACKS_FOR_INFERENCE):
            setattr(module, _PACKS_FOR_INFERENCE, False)
        kind = type(module)
        if kind in checked or not kind.__module__.startswith("bitsandbytes") or not hasattr(module, "in_features"):
            continue
        checked.add(kind)
        x_TI = torch.ones(2, module.in_features, device=module.weight.device, dtype=model.dtype)
        try:
            with torch.no_grad():
                module(x_TI)
        except Exception as error:  # the library checks its weights by whatever fails first, assertions included
            raise ModelError(
                f"model.base: expected quantised weights, as the model's configuration says, {name} ({kind.__name__}) "
                f"does not run with what it holds: {first_line(error)}; fetch the model again, or {UNQUANTISED}"
            ) from error
        if not module(x_TI.requires_grad_()).requires_grad:
            raise ModelError(
                f"model.quantization: expected layers that gradients pass through, {name} ({kind.__name__}) has none "
                "here; use another device, or model.quantization = none"
            )
