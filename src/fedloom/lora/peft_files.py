"""Adapters on disk, in the format that ``peft`` reads and writes.

Only this module and the layer know ``alpha``, rsLoRA, rank patterns and GPT-2's ``fan_in_fan_out``: what comes
out of :func:`load_peft` is effective pairs, what goes in is effective pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedloom.errors import AdapterError
from fedloom.lora.algebra import pad
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.pair import Adapter, Pair, check_finite
from fedloom.lora.peft_settings import CONFIG_NAME, Scales, read_peft_settings, shortened

PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"


def save_peft(
    adapter: Adapter,
    folder: str | Path,
    *,
    base_name: str | BaseReference,
    scale: float = 1.0,
    conv1d: bool = False,
    dropout: float = 0.0,
    parameters: Collection[str] = (),
) -> None:
    """Write an adapter as a PEFT folder, with ``lora_alpha = scale · r`` and ``b / scale`` in the file.

    Ranks that differ between modules go into ``rank_pattern`` and ``alpha_pattern``; a module of rank 0 adds nothing
    and is not written. A base that is a folder goes by the folder's name, without its place on this machine; what else
    is known of the base, such as its hash, stands in the metadata of the weights. Modules of ``parameters`` are named
    as ``target_parameters``, which peft adapts without dropout and at one rank.

    Raises:
        AdapterError: if no module has a rank above 0, since PEFT cannot express an adapter that adds nothing; if
            ``scale`` is not above 0, or a number in the file would not be finite; if a file is where the folder goes.
    """
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
    base = BaseReference.of(base_name) if isinstance(base_name, str) else base_name
    rank = max(pair.rank for pair in pairs.values())
    by_parameter = {name: f"{name}.weight" for name in pairs if name in parameters}
    # peft says of patterns for parameters that it ignores them, so these have the common rank, padded with zeros.
    stored |= pad(Adapter({name: stored[name] for name in by_parameter}), rank) if by_parameter else {}
    differing = {name: pair.rank for name, pair in stored.items() if pair.rank != rank}
    # What peft's own LoraConfig writes, but for what only its other kinds of adapters read: peft is slow to load.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(scale * rank),
        "rank_pattern": differing,
        "alpha_pattern": {name: _plain(scale * r) for name, r in differing.items()},
        "target_modules": sorted(pairs.keys() - by_parameter.keys()) or None,
        "target_parameters": sorted(by_parameter.values()) or None,
        "modules_to_save": None,
        "fan_in_fan_out": conv1d,
        "lora_dropout": 0.0 if by_parameter else dropout,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise AdapterError(f"{folder}: expected a folder to write to, found a file; choose another folder") from error
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / WEIGHTS_NAME).write_bytes(_with_metadata(save(_peft_tensors(stored)), {"format": "pt"} | base.metadata))


def load_peft(folder: str | Path) -> Adapter:
    """Read a PEFT folder as effective pairs: each module's own scale is folded into ``b``.

    Raises:
        AdapterError: if a file is absent, truncated, malformed or not LoRA, holds what a low-rank pair cannot express
            (DoRA, activated LoRA, trained biases, whole modules, embeddings), pairs on a base that their
            initialisation changed (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ), or numbers that are not finite.
    """
    folder = Path(folder)
    config, tensors = read_peft_settings(folder), _read_tensors(folder)
    scales = Scales(config, folder)
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
        pair = _pair_of(module, found, folder)
        pairs[module] = pair.to(torch.float32).scaled(scales.of(module, pair.rank))
    if not pairs:
        raise AdapterError(f"{folder / WEIGHTS_NAME}: expected lora_A and lora_B tensors, found none; fetch it again")
    check_finite(pairs, str(folder / WEIGHTS_NAME), "its training diverged: train again at a lower learning rate")
    return Adapter(pairs)


def parameters_of(folder: Path) -> frozenset[str]:
    """Return the modules that a PEFT folder names as ``target_parameters``.

    Raises:
        AdapterError: if its settings are absent or malformed.
    """
    named = read_peft_settings(folder).get("target_parameters") or ()
    return frozenset(name.removesuffix(".weight") for name in named)


def base_of(folder: Path) -> tuple[str, BaseReference] | None:
    """Return the base model that a PEFT folder names, as written there and as it may be told to others.

    Raises:
        AdapterError: if a file is absent or malformed.
    """
    name = read_peft_settings(folder).get("base_model_name_or_path")
    if not name:
        return None
    with _explained(folder / WEIGHTS_NAME), safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        return str(name), BaseReference.recorded(str(name), file.metadata() or {})


def _peft_tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.a_RI.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.b_OR.contiguous()
    return tensors


def _with_metadata(blob: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file with metadata in the given order; safetensors writes several keys in any order."""
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.dumps({"__metadata__": dict(metadata)} | json.loads(blob[8:end]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + blob[end:]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if not (folder / _PICKLED).is_file():
            raise AdapterError(f"{folder}: expected {WEIGHTS_NAME}, found none; fetch the folder again")
        raise AdapterError(
            f"{folder}: expected {WEIGHTS_NAME}, found {_PICKLED}, which may run code when it is read; if you trust "
            "it, load it with stock peft and write it by save_pretrained, which gives safetensors"
        )
    with _explained(path):
        return load_file(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: expected a safetensors file, got one that is corrupt or truncated ({error}); fetch it again"
        ) from error


def _pair_of(module: str, factors: Mapping[str, Tensor], folder: Path) -> Pair:
    for kind, tensor in factors.items():
        if tensor.ndim != 2 or not tensor.dtype.is_floating_point:
            found = f"shape {tuple(tensor.shape)} and dtype {str(tensor.dtype).removeprefix('torch.')}"
            raise AdapterError(
                f"{folder / WEIGHTS_NAME}: expected lora_{kind.upper()} of {module} as a matrix of floats, got "
                f"{found}; fetch it again"
            )
    try:
        return Pair(factors["b"], factors["a"])
    except AdapterError as error:
        raise AdapterError(f"{folder / WEIGHTS_NAME}: {module}: {error}") from error


def _split_key(key: str, folder: Path) -> tuple[str, str]:
    for kind in "ab":
        suffix = f".lora_{kind.upper()}.weight"
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key.removeprefix(PREFIX).removesuffix(suffix), kind
    raise AdapterError(
        f"{folder / WEIGHTS_NAME}: expected only lora_A and lora_B weights, got {shortened(key)}; choose a plain LoRA "
        "adapter"
    )


def _plain(value: float) -> float | int:
    """Return 16 for 16.0: files then read as people write them."""
    return int(value) if float(value).is_integer() else value
