"""Load one part of a checkpoint: a client reads its own blocks from disk, the server its own, neither the whole model.

The model is laid out without memory, absent modules are replaced by the placeholders of a cut, and only what is left
is read from the safetensors files. Module names stay those of the uncut model, so adapters fit both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedloom.data.own_code import own_code_refusal
from fedloom.errors import ModelError
from fedloom.models.base_folder import read_config
from fedloom.models.cut import Part, Passed, absent, check_cuts, cuttable_parts, num_blocks, part_of, top_of
from fedloom.models.threads import BUILDING


@dataclass(frozen=True)
class PartialBase:
    """A causal LM of which only one part has weights, the part itself, and how many bytes of weights were read."""

    model: nn.Module
    part: Part
    loaded_bytes: int


def load_bottom(
    folder: str | Path, cut_layer: int, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PartialBase:
    """Load the embeddings and the blocks before ``cut_layer``: what a client holds.

    Raises:
        CutError: if the model cannot be cut there.
        ModelError: if a tensor of this part is not in the folder, or the model needs code that is not trusted.
    """
    return _load(folder, 0, cut_layer, dtype, trust_remote_code)


def load_middle(
    folder: str | Path, start: int, stop: int, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PartialBase:
    """Load blocks ``start`` to ``stop`` only: what the server of a U-shape holds."""
    return _load(folder, start, stop, dtype, trust_remote_code)


def load_top(
    folder: str | Path, start: int, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PartialBase:
    """Load the blocks from ``start``, the final norm and the head: a server's part, or a client's tail in a U-shape."""
    return _load(folder, start, None, dtype, trust_remote_code)


def _load(folder: str | Path, start: int, stop: int | None, dtype: torch.dtype, trust_remote_code: bool) -> PartialBase:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    path = Path(folder)
    config = read_config(path, trust_remote_code)
    try:
        with BUILDING, init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise own_code_refusal(error, path) or error from None
    depth = num_blocks(model)
    _check_part(start, stop, depth)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    part = top_of(model, start) if stop is None else part_of(model, start, stop)
    _drop_absent(model, start, depth if stop is None else stop, keeps_head=stop is None)
    loaded_bytes = _fill(model, path, tied, dtype)
    part = top_of(model, start) if stop is None else part_of(model, start, stop)
    return PartialBase(model.eval().requires_grad_(False), part.eval(), loaded_bytes)


def _check_part(start: int, stop: int | None, depth: int) -> None:
    """Reject a bottom or middle without a block, and a top that would be the whole model."""
    if stop is None:
        check_cuts((start,), depth + 1)
    elif start == 0:
        check_cuts((stop,), depth)
    else:
        check_cuts((start,), depth, depth - stop)


def _drop_absent(model: Any, start: int, stop: int, *, keeps_head: bool) -> None:
    """Replace what this part does not hold by placeholders, so that nothing is read for it."""
    family = cuttable_parts(model)
    blocks: Any = model.get_submodule(family.blocks)
    for index in range(len(blocks)):
        if not start <= index < stop:
            blocks[index] = Passed()
    for name in family.before if start else ():
        _replace(model, name, absent(model.get_submodule(name)))
    if not keeps_head:
        for name in (*family.after, family.head):
            _replace(model, name, nn.Identity())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _fill(model: Any, folder: Path, tied: dict[str, str], dtype: torch.dtype) -> int:
    """Read every parameter that is left from the checkpoint; return the bytes read."""
    where, prefix, read_bytes = _index(folder), f"{model.base_model_prefix}.", 0
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        # A file may lack the prefix of the causal LM (``model.``), and hold a tied weight under its other name.
        names = (name, tied.get(name, name))
        spellings = [spelling for key in names for spelling in (key, key.removeprefix(prefix))]
        stored = next((s for s in spellings if s in where), None)
        if stored is None:
            raise ModelError(f"model.base: expected the tensor {name} in {folder}, found none; fetch the model again")
        tensor = _read(where[stored], stored)
        read_bytes += tensor.nbytes
        parent, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(dtype), requires_grad=False)
        model.get_submodule(parent)._parameters[leaf] = parameter  # a meta tensor cannot be copied into, only replaced
    return read_bytes


def _index(folder: Path) -> dict[str, Path]:
    """Map tensor names to files: by the index of a sharded checkpoint, or by the headers of the files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in files.items()}
    where = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    return where


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor
