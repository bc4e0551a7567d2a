"""Find the parts of a decoder that no table knows: its list of blocks, and what comes ahead of and behind it.

What is found is a guess by structure. A cut made by it is compared with the uncut model before it is used
(:func:`fedloom.models.cut.verify_cut`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

_QUERIES = ("q_proj", "q_b_proj", "query", "query_proj", "project_q", "Wq", "q_lin")
_VALUES = ("v_proj", "kv_b_proj", "value", "value_proj", "project_v", "Wv", "v_lin", "kv_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
_READS_ANOTHER = re.compile(r"(^|\.)(encoder_attn|cross_?attn|cross_?attention|encdec_attn)(\.|$)", re.IGNORECASE)
"""Attention over what another model has read, which a decoder alone never calls."""


@dataclass(frozen=True)
class Parts:
    """Module names: the token embeddings first among those ahead of the blocks; those behind them, without the head."""

    before: tuple[str, ...]
    blocks: str
    after: tuple[str, ...]
    head: str


def num_blocks_of(model: Any) -> int:
    """Return how many blocks a model's configuration states, 0 where it states none."""
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))


def discovered_parts(model: Any) -> Parts | None:
    """Return the parts of a causal LM; None unless exactly one list of blocks is in the module of the embeddings.

    Modules of that decoder that hold parameters are ahead of the blocks or behind them as they are in its definition;
    those without (rotary embeddings) belong to every part, but for a norm without weights.
    """
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = names.get(model.get_input_embeddings()), names.get(model.get_output_embeddings())
    if not embeddings or not head:
        return None
    found = [
        name
        for module, name in names.items()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_blocks_of(model)
        and embeddings.rpartition(".")[0] == name.rpartition(".")[0]
    ]
    if len(found) != 1:
        return None
    decoder, _, leaf = found[0].rpartition(".")
    before, after, place = [], [], None
    for name, module in model.get_submodule(decoder).named_children():
        if name == leaf:
            place = name
        elif isinstance(module, nn.Embedding) or (place is None and _has_parameters(module)):
            before.append(f"{decoder}.{name}")
        elif place is not None and (_has_parameters(module) or "norm" in name):
            after.append(f"{decoder}.{name}")
    before.sort(key=lambda name: name != embeddings)
    return Parts(tuple(before), found[0], tuple(after), head)


def discovered_targets(model: nn.Module) -> tuple[str, ...]:
    """Return the last names of the text's query and value projections, or of the fused one; none if there are none."""
    away = beside_text(model)
    leaves = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if not any(module.children()) and not is_away(name, away)
    }
    query, value = (next((name for name in wanted if name in leaves), None) for wanted in (_QUERIES, _VALUES))
    if query and value:
        return (query, value)
    return next(((name,) for name in _FUSED if name in leaves), ())


def beside_text(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's parts that never see its text: towers for images and sounds."""
    embeddings = _input_embeddings(model)
    if embeddings is None:
        return ()
    from transformers import PreTrainedModel

    return tuple(
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and embeddings not in module.modules()
    )


def is_away(name: str, away: Collection[str]) -> bool:
    """Whether a module is in one of these parts, or attends to what another model has read."""
    inside = any(name == part or name.startswith(f"{part}.") for part in away)
    return inside or _READS_ANOTHER.search(name) is not None


def _input_embeddings(model: Any) -> nn.Module | None:
    try:
        embeddings: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embeddings


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
