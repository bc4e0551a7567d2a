"""Adapters on disk, in the format that ``peft`` reads and writes.

Only this module and the layer know ``alpha``, rsLoRA, rank patterns and GPT-2's ``fan_in_fan_out``: what comes
out of :func:`load_peft` is effective pairs, what goes in is effective pairs.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedloom.errors import AdapterError
from fedloom.lora.pair import Adapter, Pair, check_finite

PREFIX = "base_model.model."
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_FOREIGN = (
    "use_dora",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "target_parameters",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
)
"""Settings with which peft (0.21) computes something else than ``W + s · B A``.

VeLoRA is not listed: it changes only the backward pass.
"""

_CONVERT = (
    "convert it to plain LoRA with peft's save_pretrained(folder, path_initial_model_for_weight_conversion=F), F being "
    "the adapter saved before training"
)
_CHANGES_BASE = {
    **dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), _CONVERT),
    "loftq": "peft cannot convert it: train again with init_lora_weights = true",
}
"""Initialisations (by prefix) that change the base's weights. EVA, orthogonal, gaussian and MiCA do not."""


def save_peft(
    adapter: Adapter,
    folder: str | Path,
    *,
    base_name: str,
    scale: float = 1.0,
    conv1d: bool = False,
    dropout: float = 0.0,
) -> None:
    """Write an adapter as a PEFT folder, with ``lora_alpha = scale · r`` and ``b / scale`` in the file.

    Ranks that differ between modules go into ``rank_pattern`` and ``alpha_pattern``; a module of rank 0 adds nothing
    and is not written.

    Raises:
        AdapterError: if no module has a rank above 0, since PEFT cannot express an adapter that adds nothing; if
            ``scale`` is not above 0, or a number in the file would not be finite; if a file is where the folder goes.
    """
    from peft import LoraConfig

    if not (math.isfinite(scale) and scale > 0.0):
        raise AdapterError(f"scale: expected a finite number above 0, got {scale}; choose a positive scale")
    pairs = {name: pair for name, pair in adapter.items() if pair.rank > 0}
    if not pairs:
        raise AdapterError(
            "expected an adapter with a module of rank 1 or more, got one that adds nothing; train it first"
        )
    # PEFT multiplies by lora_alpha / r when it loads; the file holds b without that scale.
    stored = {}
    for name, pair in pairs.items():
        stored[name] = Pair(pair.b_OR.detach().cpu() / scale, pair.a_RI.detach().cpu())
    check_finite(stored, "the adapter to write", "train it at a lower learning rate, or write it in a wider dtype")
    ranks = {name: pair.rank for name, pair in pairs.items()}
    rank = max(ranks.values())
    differing = {name: r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=_plain(scale * rank),
        rank_pattern=differing,
        alpha_pattern={name: _plain(scale * r) for name, r in differing.items()},
        target_modules=sorted(pairs),
        fan_in_fan_out=conv1d,
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise AdapterError(f"{folder}: expected a folder to write to, found a file; choose another folder") from error
    config.save_pretrained(str(folder))
    save_file(_peft_tensors(stored), folder / WEIGHTS_NAME, metadata={"format": "pt"})


def load_peft(folder: str | Path) -> Adapter:
    """Read a PEFT folder as effective pairs: each module's own scale is folded into ``b``.

    Raises:
        AdapterError: if a file is absent, truncated, malformed or not LoRA, holds what a low-rank pair cannot express
            (DoRA, activated LoRA, trained biases, whole modules, embeddings), pairs on a base that their
            initialisation changed (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ), or numbers that are not finite.
    """
    folder = Path(folder)
    config, tensors = _read_config(folder), _read_tensors(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, kind = _split_key(key, folder)
        factors.setdefault(module, {})[kind] = tensor
    pairs = {}
    for module, found in factors.items():
        if found.keys() != {"a", "b"}:
            raise AdapterError(
                f"{folder / WEIGHTS_NAME}: expected lora_A and lora_B of {module}, found only one; fetch it again"
            )
        pair = Pair(found["b"], found["a"])
        pairs[module] = pair.to(torch.float32).scaled(_scale_of(config, module, pair.rank, folder))
    if not pairs:
        raise AdapterError(f"{folder / WEIGHTS_NAME}: expected lora_A and lora_B tensors, found none; fetch it again")
    check_finite(pairs, str(folder / WEIGHTS_NAME), "its training diverged: train again at a lower learning rate")
    return Adapter(pairs)


def base_name_of(folder: Path) -> str | None:
    """Return the base model that a PEFT folder names."""
    name = _read_config(folder).get("base_model_name_or_path")
    return str(name) if name else None


def _peft_tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a_RI.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b_OR.contiguous()
    return tensors


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"{folder}: expected a PEFT adapter with {CONFIG_NAME}, found none; check the path")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path}: expected JSON, got truncated or malformed text ({error}); fetch it again"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected the settings of an adapter, got {_shortened(config)}; fetch it again")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: expected peft_type LORA, got {config.get('peft_type')!r}; choose a LoRA adapter")
    foreign = [key for key in _FOREIGN if config.get(key)]
    if config.get("bias", "none") != "none":
        foreign.append("bias")
    if foreign:
        raise AdapterError(
            f"{path}: expected low-rank pairs only, {foreign[0]} = {config[foreign[0]]!r} cannot be expressed as one; "
            "choose a plain LoRA adapter"
        )
    _refuse_changed_base(path, str(config.get("init_lora_weights")))
    return config


def _refuse_changed_base(path: Path, initialisation: str) -> None:
    """Reject pairs that are not relative to the base itself: peft took their start out of it, or quantised it."""
    kind = next((kind for kind in _CHANGES_BASE if initialisation.lower().startswith(kind)), None)
    if kind is not None:
        advice = _CHANGES_BASE[kind]
        raise AdapterError(
            f"{path}: expected pairs on the unchanged base, init_lora_weights = {initialisation!r} changes the base "
            f"first; {advice}"
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{folder}: expected {WEIGHTS_NAME}, found none; convert .bin files to safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: expected a safetensors file, got one that is corrupt or truncated ({error}); fetch it again"
        ) from error


def _split_key(key: str, folder: Path) -> tuple[str, str]:
    for kind in "ab":
        suffix = f".lora_{kind.upper()}.weight"
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key.removeprefix(PREFIX).removesuffix(suffix), kind
    raise AdapterError(
        f"{folder / WEIGHTS_NAME}: expected only lora_A and lora_B weights, got {key}; choose a plain LoRA adapter"
    )


def _scale_of(config: Mapping[str, Any], module: str, rank: int, folder: Path) -> float:
    from peft.utils.other import get_pattern_key

    path = folder / CONFIG_NAME

    def setting(pattern: str, default: str) -> float:
        patterns = config.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{path}: expected {pattern} by module, got {_shortened(patterns)}; fetch it again")
        value = patterns.get(get_pattern_key(list(patterns), module), config.get(default))
        # bool is a subclass of int
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(
                f"{path}: expected {default} of {module} as a number, got {_shortened(value)}; fetch it again"
            )
        return value

    stated = setting("rank_pattern", "r")
    if stated != rank:
        raise AdapterError(
            f"{folder}: expected rank {stated} of {module} as {CONFIG_NAME} states, its tensors have rank {rank}; "
            "fetch it again"
        )
    if rank < 1:
        raise AdapterError(f"{folder}: expected a rank of 1 or more of {module}, got {rank}; fetch it again")
    alpha = setting("alpha_pattern", "lora_alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _shortened(value: object) -> str:
    return "none" if value is None else textwrap.shorten(json.dumps(value), 60)


def _plain(value: float) -> float | int:
    """Return 16 for 16.0: files then read as people write them."""
    return int(value) if float(value).is_integer() else value
