"""Load one part of a checkpoint: a client reads its own blocks from disk, the server its own, neither the whole model.

The model is laid out without memory, absent modules are replaced by the placeholders of a cut, and only what is left
is read from the safetensors files. Module names stay those of the uncut model, so adapters fit both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedloom.data.own_code import own_code_refusal
from fedloom.errors import ModelError
from fedloom.models.base_folder import read_config
from fedloom.models.cut import Part, Passed, absent, check_cuts, cuttable_parts, num_blocks, part_of, top_of
from fedloom.models.fused import fuse_operators
from fedloom.models.load import DTYPES, BaseFolder, Dtype, Quantization, bars_on_terminals_only
from fedloom.models.threads import BUILDING


@dataclass(frozen=True)
class PartialBase:
    """A causal LM of which only one part has weights, the part itself, and how many bytes of weights were read."""

    model: nn.Module
    part: Part
    loaded_bytes: int


@dataclass(frozen=True)
class Held:
    """Which blocks of a base one party holds: those before ``stop_bottom``, and those of ``start`` to ``stop``.

    The embeddings come with the first block, the final norm and the head with what lies behind the last one.
    """

    stop_bottom: int
    start: int
    stop: int

    def has(self, block: int) -> bool:
        """Tell whether a block is held."""
        return block < self.stop_bottom or self.start <= block < self.stop


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


def client_part(
    found: BaseFolder,
    cut_layer: int,
    tail_blocks: int | None,
    *,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
) -> nn.Module:
    """Load what a client holds: the bottom up to its cut and, in a U-shape, the last blocks, final norm and head.

    Raises:
        CutError: if the model cannot be cut there.
        ModelError: if a tensor is not in the folder, or the base is to be quantised.
    """
    depth, top = _bounds(found, cut_layer, tail_blocks)
    return _placed(found, Held(cut_layer, top, depth), tail_blocks is not None, dtype, quantization)


def server_part(
    found: BaseFolder,
    cut_layer: int,
    tail_blocks: int | None,
    *,
    dtype: Dtype = "auto",
    quantization: Quantization = "none",
) -> nn.Module:
    """Load what a server holds: the blocks from the lowest cut to the top or, in a U-shape, to the clients' tails.

    Raises: as for :func:`client_part`.
    """
    _, top = _bounds(found, cut_layer, tail_blocks)
    return _placed(found, Held(0, cut_layer, top), tail_blocks is None, dtype, quantization)


def skeleton(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """Return the whole model's structure without a single weight: names and shapes, for whoever holds a part of it.

    Raises:
        ModelError: if the model needs code that is not trusted.
    """
    model: nn.Module = _laid_out(folder, torch.float32, trust_remote_code)[0]
    return model


def _bounds(found: BaseFolder, cut_layer: int, tail_blocks: int | None) -> tuple[int, int]:
    """Return the number of blocks, and the first of those that the clients hold behind the server's."""
    depth, tail = found.config.get_text_config().num_hidden_layers, tail_blocks or 0
    check_cuts((cut_layer,), depth, tail)
    return depth, depth - tail


def _placed(found: BaseFolder, held: Held, keeps_head: bool, dtype: Dtype, quantization: Quantization) -> nn.Module:
    if quantization != "none":
        raise ModelError(
            f"model.quantization: expected none for a part of a base, got {quantization}; set it to none, and to save "
            "memory set model.dtype = bfloat16"
        )
    wanted = DTYPES[dtype]
    chosen = wanted if isinstance(wanted, torch.dtype) else _own_dtype(found)
    model, tied = _laid_out(found.path, chosen, found.is_trusted)
    _drop_absent(model, held, keeps_head=keeps_head)
    _fill(model, found.path, tied, chosen)
    placed: nn.Module = model.eval().requires_grad_(False).to(found.device)
    return placed


def _own_dtype(found: BaseFolder) -> torch.dtype:
    """Return the type that the configuration names, or else that of the first weight."""
    named = getattr(found.config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    where = _index(found.path)
    kinds = (_read(file, name).dtype for name, file in sorted(where.items()))
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


class _WithoutMemory(TorchFunctionMode):
    """Let this thread's ``torch.empty``, of which layers make their weights, take no memory; buffers are computed.

    Other ways replace functions of torch's own classes, and so change the layers of other threads.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.empty and given.get("device") is None:
            given = {**given, "device": "meta"}
        return func(*args, **given)


def _laid_out(path: Path, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, dict[str, str]]:
    """Return a model whose parameters have no memory, and which of them are another one's under a second name."""
    from transformers import AutoModelForCausalLM

    config = read_config(path, trust_remote_code)
    try:
        with BUILDING, _WithoutMemory():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise own_code_refusal(error, path) or error from None
    return fuse_operators(model), dict(getattr(model, "all_tied_weights_keys", None) or {})


def _load(folder: str | Path, start: int, stop: int | None, dtype: torch.dtype, trust_remote_code: bool) -> PartialBase:
    path = Path(folder)
    model, tied = _laid_out(path, dtype, trust_remote_code)
    depth = num_blocks(model)
    _check_part(start, stop, depth)
    _drop_absent(model, Held(0, start, depth if stop is None else stop), keeps_head=stop is None)
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


def _drop_absent(model: Any, held: Held, *, keeps_head: bool) -> None:
    """Replace what this part does not hold by placeholders, so that nothing is read for it."""
    family = cuttable_parts(model)
    blocks: Any = model.get_submodule(family.blocks)
    for index in range(len(blocks)):
        if not held.has(index):
            blocks[index] = Passed()
    for name in () if held.has(0) else family.before:
        _replace(model, name, absent(model.get_submodule(name)))
    if not keeps_head:
        for name in (*family.after, family.head):
            _replace(model, name, nn.Identity())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _fill(model: Any, folder: Path, tied: dict[str, str], dtype: torch.dtype) -> int:
    """Read every number that is left from the checkpoint; return the bytes read."""
    where, prefix = _index(folder), f"{model.base_model_prefix}."
    read_bytes, filled = _fill_rearranged(model, where, tied, dtype)
    parameters, kept = dict(model.named_parameters(remove_duplicate=False)), model.state_dict().keys()
    for name in [*parameters, *(name for name, _ in model.named_buffers() if name in kept)]:
        if name in filled:
            continue
        # A file may lack the prefix of the causal LM (``model.``), and hold a tied weight under its other name.
        names = (name, tied.get(name, name))
        spellings = [spelling for key in names for spelling in (key, key.removeprefix(prefix))]
        stored = next((s for s in spellings if s in where), None)
        if stored is None:
            raise ModelError(f"model.base: expected the tensor {name} in {folder}, found none; fetch the model again")
        tensor = _read(where[stored], stored)
        read_bytes += tensor.nbytes
        module, leaf = _place(model, name)
        if name in parameters:  # a meta tensor cannot be copied into, only replaced
            module._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        else:
            module._buffers[leaf] = tensor.to(module.get_buffer(leaf).dtype)
    return read_bytes


def _fill_rearranged(
    model: Any, where: Mapping[str, Path], tied: Mapping[str, str], dtype: torch.dtype
) -> tuple[int, frozenset[str]]:
    """Read a checkpoint whose layout is not the model's, such as one of a tensor per expert, as transformers does.

    Returns the bytes and the names of what was read: nothing where the layout is the model's own.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError:  # an older one, which knows no other layout by these names
        return 0, frozenset()
    if not get_model_conversion_mapping(model, add_legacy=False):
        return 0, frozenset()
    # A head may be stored as the embeddings only, which this part does not have: they are read in their place for it.
    parameters = dict(model.named_parameters())
    lent = {name: other for name, other in tied.items() if name in parameters and other not in parameters}
    for name, other in lent.items():
        holder, leaf = _place(model, other)
        holder.register_parameter(leaf, nn.Parameter(torch.empty_like(parameters[name], device="meta")))
    with ExitStack() as stack, bars_on_terminals_only():
        files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(where.values())}
        slices = {name: files[file].get_slice(name) for name, file in where.items()}
        rules = LoadStateDictConfig(dtype=dtype, weight_mapping=get_model_conversion_mapping(model))
        report, _ = convert_and_load_state_dict_in_model(model, slices, rules)
    missing = set(report.missing_keys)
    for name, other in lent.items():
        (holder, leaf), (module, own) = _place(model, other), _place(model, name)
        parameter = holder._parameters.pop(leaf)
        if other not in missing:
            module._parameters[own] = parameter
            missing.discard(name)
    state = model.state_dict()
    filled = frozenset(state.keys() - missing)
    return sum(state[name].nbytes for name in filled), filled


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor, and the tensor's name in it."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


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
