"""Cut a decoder at a block, so that two computers run one model: the family's own forward, over a part of its blocks.

A part is a shallow copy of the Hugging Face decoder in which the absent blocks pass their input through, the first
absent block of an upper part puts the received activations in place of whatever the forward made of its inputs, and the
final norm stays only where the last block is. Block indices, layer types, rotary tables and cache slots are therefore
those of the uncut model; scaled embeddings, learned positions and embedding norms act exactly once, at the bottom; and
parts share their blocks with the model they were cut from, so both see an adapter that wraps a projection there.

Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedloom.errors import CutError, ModelError
from fedloom.models.families import Family, decoder_blocks, model_type
from fedloom.models.foreign_forward import foreign_forward
from fedloom.models.row_attention import attention_of


def cuttable_parts(model: nn.Module) -> Family:
    """Return the names of the model's parts, if it is of a family that can be cut, and its rows are packed.

    Raises:
        CutError: if it is not, by name.
    """
    if attention_of(model) == "padded":
        raise CutError(
            "model.attention: expected packed for a model that is cut, whose parts run on rows without padding, got "
            "padded; drop it, or use a method that does not cut the model"
        )
    try:
        return decoder_blocks(model)
    except ModelError as problem:
        raise CutError(f"{problem}, or use a method that does not cut the model") from None


def num_blocks(model: nn.Module) -> int:
    """Count the blocks of a model, which bounds where it can be cut."""
    return len(_block_list(model, cuttable_parts(model)))


def check_cuts(cuts: Sequence[int], depth: int, tail_blocks: int = 0) -> None:
    """Reject a cut that leaves the client or the server without a block.

    Raises:
        CutError: naming what is allowed.
    """
    highest = depth - tail_blocks - 1
    if tail_blocks < 0 or highest < 1:
        raise CutError(
            f"split.tail_blocks: expected 0 to {depth - 2} of this model's {depth} blocks, got {tail_blocks}; "
            "choose another number"
        )
    for cut_layer in cuts:
        if not 1 <= cut_layer <= highest:
            raise CutError(
                f"split.cut_layer: expected 1 to {highest} (of {depth} blocks, {tail_blocks} are in the client's tail, "
                f"and client and server need one each), got {cut_layer}; choose another cut"
            )


class Part(nn.Module):
    """Blocks ``start`` to ``stop`` of a decoder, run by the family's own forward.

    The bottom part (``start = 0``) takes token ids, any other takes activations. The top part ends in the final norm;
    the head stays with ``model`` and the loss. Parameters and buffers are the model's own, not copies.
    """

    def __init__(self, decoder: nn.Module, entry: Entry | None, start: int, stop: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.entry = entry
        self.start, self.stop = start, stop

    def forward(self, inputs: Tensor, **keywords: Any) -> Tensor:
        """Run the part on ids (B, T) or activations (B, T, D); return the activations (B, T, D) behind its last block.

        Keywords (``position_ids``, ``past_key_values``, ``use_cache``, ...) go to the family's forward as they are.
        """
        if self.entry is None:
            return cast(Tensor, self.decoder(input_ids=inputs, **keywords).last_hidden_state)
        # The forward gets the activations twice. As ``inputs_embeds`` they only give it shape, dtype and device:
        # there the family scales or shifts embeddings, which the bottom part has already done. The entry block then
        # puts the real activations in their place, with their graph, so that gradients reach the client.
        self.entry.here.hidden_BTD = inputs
        try:
            return cast(Tensor, self.decoder(inputs_embeds=inputs.detach(), **keywords).last_hidden_state)
        finally:
            del self.entry.here.hidden_BTD

    def new_cache(self) -> Any:
        """Return an empty key/value cache for this part.

        The slots of absent blocks point at a present block of the same kind, because the family's forward asks the
        first slot of a kind how many tokens it has seen.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.decoder.config)
        present = range(self.start, min(self.stop, len(cache.layers)))
        for index, layer in enumerate(cache.layers):
            if index in present:
                continue
            same_kind = [cache.layers[i] for i in present if type(cache.layers[i]) is type(layer)]
            cache.layers[index] = next(iter(same_kind or [cache.layers[i] for i in present]), layer)
        return cache


def cut(model: nn.Module, *boundaries: int) -> list[Part]:
    """Cut ``model`` before each of the given blocks and return the parts, bottom first.

    ``cut(model, c)`` gives client and server; ``cut(model, c, L - d)`` gives the three parts of a U-shape, whose top
    holds the last ``d`` blocks (possibly none) and the final norm. Law: chained, they equal the uncut decoder.

    Raises:
        CutError: if a boundary leaves a part without a block, or the family cannot be cut.
    """
    depth = num_blocks(model)
    check_cuts(boundaries[:1], depth, depth - boundaries[-1] if len(boundaries) > 1 else 0)
    edges = [0, *boundaries, depth]
    if edges != sorted(edges):
        raise CutError(f"split.cut_layer: expected ascending cuts, got {list(boundaries)}; sort them")
    parts = [part_of(model, start, stop) for start, stop in itertools.pairwise(edges[:-1])]
    return [*parts, top_of(model, edges[-2])]


def part_of(model: nn.Module, start: int, stop: int) -> Part:
    """Make the part of blocks ``start`` to ``stop``, without the final norm, sharing its modules with ``model``."""
    family = cuttable_parts(model)
    top = top_of(model, start)
    blocks = cast(nn.ModuleList, top.decoder._modules[_leaf(family.blocks)])
    # Absent blocks stay in the list as blocks that pass their input through: the family's forward indexes layer types,
    # rotary tables and cache slots by a block's position, which must be that of the uncut model.
    for index in range(stop, len(blocks)):
        blocks[index] = Passed()
    for name in family.after:
        top.decoder._modules[_leaf(name)] = nn.Identity()
    return Part(top.decoder, top.entry, start, stop)


def top_of(model: nn.Module, start: int) -> Part:
    """Make the part from block ``start`` to the final norm, sharing its modules with ``model``."""
    family = cuttable_parts(model)
    body = _decoder(model, family)
    # A shallow copy with a module table of its own: children can be replaced here without touching the model, and all
    # others, with their parameters and any adapter that wraps them, are the model's own.
    shell = copy.copy(body)
    shell.__dict__["_modules"] = dict(body._modules)
    blocks = nn.ModuleList(list(_block_list(model, family)))
    shell._modules[_leaf(family.blocks)] = blocks
    entry = Entry() if start else None
    for index in range(start):
        blocks[index] = entry if index == 0 and entry is not None else Passed()
    if entry is not None:
        for name in family.before:
            shell._modules[_leaf(name)] = absent(model.get_submodule(name))
    return Part(shell, entry, start, len(blocks))


def absent(module: nn.Module) -> nn.Module:
    """Return the replacement of a module ahead of the first block in a part that does not have that block."""
    if isinstance(module, nn.Embedding):
        return NoEmbedding()
    # Without parameters it is the rotary embedding: every part needs it, and computes it from the positions.
    has_parameters = any(True for _ in module.parameters())
    return nn.Identity() if has_parameters else module


def _block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(family.blocks))


def _decoder(model: nn.Module, family: Family) -> nn.Module:
    return model.get_submodule(family.blocks.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def verify_cut(model: nn.Module, parts: Sequence[Part], num_tokens: int = 6) -> None:
    """Run a probe through the uncut model and through its parts, and reject a cut that changes the result.

    Raises:
        CutError: if they differ, which means that this family's forward does something that the cut does not know.
    """
    ids_BT = torch.arange(num_tokens, device=next(model.parameters()).device)[None] + 1
    with torch.no_grad(), foreign_forward(model):
        body = _decoder(model, cuttable_parts(model))
        expected_BTD = body(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden = ids_BT
        for part in parts:
            hidden = part(hidden, use_cache=False)
    error, size = float((hidden - expected_BTD).abs().max()), float(expected_BTD.abs().max())
    if not error <= 1e-4 * max(size, 1e-6):
        raise CutError(
            f"model.base: {model_type(model)} cannot be cut, the outputs differ by {error:.2g} of {size:.2g}; "
            "use a method that does not cut the model"
        )


class Passed(nn.Module):
    """An absent block: activations pass through."""

    def forward(self, hidden_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_BTD


class Entry(nn.Module):
    """The first absent block of an upper part: the received activations replace what the forward made of its inputs.

    They are each thread's own, so that several passes may be in the part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.local()

    def forward(self, _: Tensor, *__: Any, **___: Any) -> Tensor:
        received: Tensor = self.here.hidden_BTD
        return received


class NoEmbedding(nn.Module):
    """An absent embedding (tokens or learned positions), which adds nothing."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(())  # broadcasts to any shape, so it need not know batch, length or width
