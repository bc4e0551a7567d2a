"""Whether stock peft reads on a base what is written for it, checked on the base without its numbers.

peft rewrites the targets of mixture-of-experts families from an older layout of theirs: a target whose name ends like
an expert's (``gate_proj``, ``down_proj``, ...) is taken for the experts, and an adapter of a dense layer or of a shared
expert of that name is dropped without a word. Such modules are written as ``target_parameters`` instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

from fedloom.lora.peft_files import PREFIX, WEIGHTS_NAME
from fedloom.models.threads import BUILDING

LISTED = 3
"""Modules that a message names."""


def taken_for_experts(config: Any, modules: Iterable[str]) -> frozenset[str]:
    """Return those of the modules that peft would take for the experts of a base with this configuration."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # peft 0.18 knows no other layout
        return frozenset()
    from peft import LoraConfig

    base = SimpleNamespace(config=config)

    def is_kept(module: str) -> bool:
        lora = LoraConfig(target_modules=[module])
        try:
            convert(lora, base, None)
        except (ValueError, AttributeError):
            return False
        return module in (lora.target_modules or ())

    names = list(modules)
    # The rule looks at the last name only, so one module of each is asked about.
    kept = {leaf: is_kept(f"some.{leaf}") for leaf in {name.rpartition(".")[2] for name in names}}
    return frozenset(name for name in names if not kept[name.rpartition(".")[2]])


def not_read(folder: Path, config: Any, *, trust_remote_code: bool = False) -> str | None:
    """Return what stock peft does not read of an adapter's folder on a base with this configuration; None if nothing.

    The base is laid out without numbers, the adapter is loaded onto it, and names and shapes are compared.
    """
    import peft
    from transformers import AutoModelForCausalLM

    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    reason = ""
    try:
        with BUILDING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            settings = peft.PeftConfig.from_pretrained(str(folder))
            model: Any = peft.PeftModelForCausalLM(base, settings, low_cpu_mem_usage=True)
            result = model.load_adapter(str(folder), "default", low_cpu_mem_usage=True)
        missing = {key.replace(".default.", ".") for key in result.missing_keys}
        read = {
            key.replace(".default.", "."): tuple(tensor.shape)
            for key, tensor in model.state_dict().items()
            if ".lora_" in key
        }
    except Exception as error:  # whatever peft or the model's own code raises, it is not read
        missing, read = set(), {}
        reason = f" ({next(iter(str(error).splitlines()), type(error).__name__)})"
    lost = sorted(
        {_module(key) for key, shape in written.items() if read.get(key) != shape or key in missing}, key=_by_number
    )
    if not lost:
        return None
    more = f" and {len(lost) - LISTED} more" if len(lost) > LISTED else ""
    return (
        f"stock peft {peft.__version__} does not load {len(lost)} of {len(written) // 2} modules of this adapter on "
        f"this base: {', '.join(lost[:LISTED])}{more}{reason}; use a merged model there (export with --merge)"
    )


def _module(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".lora_")[0]


def _by_number(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
