"""How many bytes of tensors a pass holds at most: the engine's own pass, over shapes without numbers, is watched.

Nothing is computed and no memory is taken, so a base of any size can be asked; what the engine learns to leave out is
left out here too. Attention that a device computes in one kernel keeps its inputs, its output and one number a row.

Letters: T tokens, S targets, H heads, E width of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedloom.errors import ModelError
from fedloom.lora.dropout import Dropout, dropout_of, row_keys
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.products import meta_is
from fedloom.models.cut import part_of
from fedloom.models.discovery import num_blocks_of
from fedloom.models.families import decoder_blocks
from fedloom.split.split_step import run_bottom
from fedloom.training.checkpointing import checkpointed_blocks
from fedloom.training.last_block import assume_targets_alone, forget_targets_alone
from fedloom.training.loss import chunk_gradient, chunk_nats, tile_of
from fedloom.training.output_head import OutputHead, read_output_head
from fedloom.training.packing import PackedBatch, Row, pack
from fedloom.training.rotation import replaced_forward
from fedloom.training.row_passes import RowPasses, row_passes

_DEPTHS, _CHECKPOINTED_DEPTHS = (1, 2), (3, 4)
"""Blocks of which a pass is watched: every other one adds what the last that came has added.

With checkpoints backward holds most where it runs a block again; the first block, which has no gradient to hand on, and
the last, which is not run again, are no examples of that.
"""
_CHUNK_PROBE = 16
"""Targets with which the bytes of one target's logits are measured: no chunk is smaller."""


@dataclass(frozen=True)
class PlannedPass:
    """One pass: the tokens of each row, how many of them are targets, and whose the rows are.

    ``ranks`` are of the open slots, ``owners`` the slot of each row.
    """

    lengths: tuple[int, ...]
    num_targets: int
    ranks: tuple[int, ...] = ()
    owners: tuple[int, ...] = ()
    dropout: float = 0.0
    label_smoothing: float = 0.0
    checkpoint_activations: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)


class HeldBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all storages that operations make, while they live; ``known`` ones are not counted."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._live.pop(key)


class _Fused(torch.autograd.Function):
    """Attention as one kernel computes it: (n, H, T, E) in and out, a number a row kept, no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _FusedAttention(TorchFunctionMode):
    """Let every call of torch's attention be such a kernel's, whichever module makes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Fused.apply(named["query"], named["key"], named["value"])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


@contextmanager
def _checkpointed(lora: LoRAModel) -> Iterator[None]:
    """Checkpoint activations; a block that backward runs again has the kernels of :class:`_FusedAttention` too."""

    def fused(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _FusedAttention():  # the one around everything is off within backward, which it sees
            return original(*args, **kwargs)

    with ExitStack() as stack:
        for block in lora.model.get_submodule(decoder_blocks(lora.model).blocks).children():
            stack.enter_context(replaced_forward(block, fused))
        stack.enter_context(checkpointed_blocks(lora))
        yield


def training_bytes(lora: LoRAModel, planned: PlannedPass, device: str) -> int:
    """Return the most bytes that a pass holds beside the base, forward and backward, on a kind of device.

    The slots' factors and gradients are among them, the optimiser's moments are not. The model is on the meta device.

    Raises:
        ModelError: its forward needs numbers.
    """
    return _through_blocks(lora, planned, device, _train)


def scoring_bytes(lora: LoRAModel, planned: PlannedPass, device: str) -> int:
    """Return the most bytes that a pass without gradients holds beside the base.

    Raises:
        ModelError: its forward needs numbers.
    """
    return _through_blocks(lora, planned, device, _score)


def bottom_bytes(lora: LoRAModel, planned: PlannedPass, device: str, num_blocks: int) -> int:
    """Return the most bytes that a client of a cut model holds for a pass through its embeddings and first blocks.

    Without open slots, as of a frozen half, nothing is kept for a way back.

    Raises:
        ModelError: its forward needs numbers.
    """
    return _through_blocks(lora, planned, device, _bottom, num_blocks)


def top_bytes(lora: LoRAModel, planned: PlannedPass, device: str, num_blocks: int) -> int:
    """Return the same of the pass through its last blocks, the head and the loss, where a client keeps the labels.

    Raises:
        ModelError: its forward needs numbers.
    """
    return _through_blocks(lora, planned, device, _train, num_blocks)


_Step = Callable[[LoRAModel, PlannedPass, Any, RowPasses], Tensor]


_MOST_REMEMBERED = 256
_REMEMBERED: dict[object, tuple[int, int, int]] = {}
"""What passes held that were watched before in this process: descriptions of one base differ in little."""


def _through_blocks(
    lora: LoRAModel, planned: PlannedPass, device: str, step: _Step, num_blocks: int | None = None
) -> int:
    """Return what a pass through so many blocks holds, or through all, by those that are watched."""
    model = lora.model
    config: Any = model.config
    sizes = tuple((name, number.dtype, tuple(number.shape)) for name, number in model.named_parameters())
    key = planned, device, step, type(model), config.to_json_string(), sizes, row_passes(model).name, *lora.shapes
    if key not in _REMEMBERED:
        if len(_REMEMBERED) >= _MOST_REMEMBERED:
            _REMEMBERED.pop(next(iter(_REMEMBERED)))
        _REMEMBERED[key] = _of_first_blocks(lora, planned, device, step)
    few, more, stated = _REMEMBERED[key]
    if step is _score:  # nothing is kept from block to block
        return more
    return few + ((stated if num_blocks is None else num_blocks) - _depths(planned)[0]) * (more - few)


def _depths(planned: PlannedPass) -> tuple[int, int]:
    return _CHECKPOINTED_DEPTHS if planned.checkpoint_activations else _DEPTHS


def _of_first_blocks(lora: LoRAModel, planned: PlannedPass, device: str, step: _Step) -> tuple[int, int, int]:
    """Watch the pass through the first blocks alone; return what it holds at each depth, and how many blocks there are.

    A model whose blocks are not known, or that has one, is watched as if all of it were that one.
    """
    try:
        name = decoder_blocks(lora.model).blocks
    except ModelError:
        return (whole := _tried(lora, planned, device, step)), whole, 1
    parent, _, leaf = name.rpartition(".")
    owner, blocks = lora.model.get_submodule(parent), list(lora.model.get_submodule(name).children())
    if len(blocks) < max(_depths(planned)):
        return (whole := _tried(lora, planned, device, step)), whole, 1
    text: Any = lora.model.config.get_text_config()  # type: ignore[operator, union-attr]
    stated, found = text.num_hidden_layers, []
    try:
        for depth in _depths(planned):
            setattr(owner, leaf, nn.ModuleList(blocks[:depth]))
            text.num_hidden_layers = depth
            found.append(_tried(lora, planned, device, step))
    finally:
        setattr(owner, leaf, nn.ModuleList(blocks))
        text.num_hidden_layers = stated
    few, more = found
    return few, more, len(blocks)


def _tried(lora: LoRAModel, planned: PlannedPass, device: str, step: _Step) -> int:
    """Watch a pass whose last block computes the targets alone, or every row where the block is made otherwise."""
    try:
        try:
            return _watched(lora, planned, device, step)
        except ModelError:
            forget_targets_alone(lora.model)
            return _watched(lora, planned, device, step)
    finally:
        forget_targets_alone(lora.model)
        lora.close()


def _watched(lora: LoRAModel, planned: PlannedPass, device: str, step: _Step) -> int:
    model, passes = lora.model, row_passes(lora.model)
    known = [*model.parameters(), *model.buffers()]
    lora.close()
    batch = _batch_of(planned, passes, device)
    if isinstance(batch, PackedBatch) and step is not _bottom:
        with torch.no_grad():
            passes.hidden_states(model, batch)
        assume_targets_alone(model, batch.layout.attended)
    kept = _checkpointed(lora) if planned.checkpoint_activations else nullcontext()
    with HeldBytes(known) as held, _FusedAttention(), kept, meta_is(device):
        lora.open_narrow([Slot(rank, 1.0) for rank in planned.ranks])
        hidden_SD = step(lora, planned, batch, passes)
        before = held.now
        of_logits = 0 if step is _bottom else _logit_bytes(read_output_head(model), hidden_SD, planned, device)
        if hidden_SD.requires_grad:
            torch.autograd.backward(hidden_SD, torch.empty_like(hidden_SD))
    return int(max(held.peak, before + of_logits))


def _train(lora: LoRAModel, planned: PlannedPass, batch: Any, passes: RowPasses) -> Tensor:
    dropout = _dropout(planned, batch)
    segments = list(zip(planned.owners, batch.lengths, strict=True))
    lora.route(segments, dropout, batch.lengths, vars(batch).get("needed_on_cpu"))
    return passes.target_states(lora.model, batch)


def _dropout(planned: PlannedPass, batch: Any) -> Dropout | None:
    keys = row_keys(0, 0, 0, np.arange(len(planned.lengths)))
    return dropout_of(planned.dropout, [keys], batch.lengths, torch.device("meta"))


def _bottom(lora: LoRAModel, planned: PlannedPass, batch: Any, _: RowPasses) -> Tensor:
    """Run the blocks at hand as a client does that is cut behind them."""
    dropout = _dropout(planned, batch)
    if planned.ranks:
        lora.route([(0, planned.num_tokens)], dropout, batch.lengths)
    else:
        lora.route_all(None)
    with torch.set_grad_enabled(bool(planned.ranks)):
        return run_bottom(part_of(lora.model, 0, num_blocks_of(lora.model)), batch)


def _score(lora: LoRAModel, _: PlannedPass, batch: Any, passes: RowPasses) -> Tensor:
    lora.route_all(None)
    with torch.no_grad():
        return passes.target_states(lora.model, batch)


def _batch_of(planned: PlannedPass, passes: RowPasses, device: str) -> Any:
    """Return the batch with its tensors on the meta device, and the places that only numbers can tell."""
    share = planned.num_targets / planned.num_tokens
    rows: list[Row] = [(np.zeros(n, np.int32), np.arange(n) >= n - max(1, round(share * n))) for n in planned.lengths]
    batch = passes.batch(rows, "meta")
    if isinstance(batch, PackedBatch):
        needed = pack(rows).needed_index_K
        vars(batch).update(needed_index_K=needed.to("meta"), needed_on_cpu=needed)
        if device == "cpu":
            vars(batch)["layout"] = pack(rows).layout
    return batch


def _logit_bytes(head: OutputHead, hidden_SD: Tensor, planned: PlannedPass, device: str) -> int:
    """Return what the loss holds at most: the hidden states' gradient and one chunk of logits with what it makes."""
    few_SD = hidden_SD.detach().new_empty(_CHUNK_PROBE, hidden_SD.shape[1])
    targets_S = torch.empty(_CHUNK_PROBE, dtype=torch.long, device="meta")
    weights_S = torch.empty(_CHUNK_PROBE, device="meta")
    with torch.no_grad(), HeldBytes([head.weight_VD, few_SD]) as held, meta_is(device):
        if hidden_SD.requires_grad:
            chunk_gradient(few_SD, head, targets_S, weights_S, planned.label_smoothing, device)
        else:
            chunk_nats(few_SD, head, targets_S, device)
    rows = min(len(hidden_SD), tile_of(device, head.vocabulary).rows)
    gradient = hidden_SD.numel() * hidden_SD.element_size() if hidden_SD.requires_grad else 0
    return int(gradient + held.peak * rows // _CHUNK_PROBE)
