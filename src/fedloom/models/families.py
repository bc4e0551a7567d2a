"""Where the parts of a decoder are, and which modules LoRA adapts.

The parts of a family in the table are those that its line names, checked against the model each time it is used, so a
renamed module is an error and never a silent skip. Those of any other family are looked for in the model
(:mod:`fedloom.models.discovery`), so a new family needs no line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fedloom.errors import ModelError
from fedloom.lora.linear import is_transposed
from fedloom.lora.products import affine
from fedloom.models.discovery import beside_text, discovered_parts, discovered_targets, is_away, num_blocks_of

ALL_LINEAR = "all-linear"
"""The pattern that stands for every linear layer below the output head."""


@dataclass(frozen=True)
class Family:
    """Module names of one decoder family, and the modules that LoRA adapts by default.

    ``before`` are the modules ahead of the first block (the token embeddings first), ``after`` those behind the last
    one and ahead of ``head``. Modules that only some sizes of a family have are listed too, and ignored where absent.
    """

    before: tuple[str, ...]
    blocks: str
    after: tuple[str, ...]
    targets: tuple[str, ...]
    head: str = "lm_head"


_QUERY_AND_VALUE = ("q_proj", "v_proj")
_LLAMA = Family(("model.embed_tokens", "model.rotary_emb"), "model.layers", ("model.norm",), _QUERY_AND_VALUE)
_GPT2 = Family(("transformer.wte", "transformer.wpe"), "transformer.h", ("transformer.ln_f",), ("c_attn",))
_OPT_DECODER = "model.decoder"

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
            *("granite", "olmo2", "smollm3", "cohere"),
        ),
        _LLAMA,
    ),
    "phi3": Family(_LLAMA.before, _LLAMA.blocks, _LLAMA.after, ("qkv_proj",)),
    "phi": Family(_LLAMA.before, _LLAMA.blocks, ("model.final_layernorm",), _QUERY_AND_VALUE),
    "gpt2": _GPT2,
    "gpt_neox": Family(
        ("gpt_neox.embed_in", "gpt_neox.rotary_emb"),
        "gpt_neox.layers",
        ("gpt_neox.final_layer_norm",),
        ("query_key_value",),
    ),
    "opt": Family(
        tuple(f"{_OPT_DECODER}.{name}" for name in ("embed_tokens", "embed_positions", "project_in")),
        f"{_OPT_DECODER}.layers",
        tuple(f"{_OPT_DECODER}.{name}" for name in ("final_layer_norm", "project_out")),
        _QUERY_AND_VALUE,
    ),
}
"""Decoder families by transformers' ``model_type``."""

_UNLIKE_TABLE = "found another layout; choose another base, or correct its line in fedloom.models.families"


def model_type(model: nn.Module) -> str:
    """Return transformers' name of a model's family, e.g. ``llama``."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def body_of(model: Any) -> nn.Module:
    """Return the part of a causal LM that maps ids to the last hidden states, ahead of its output head."""
    body: nn.Module = model.base_model
    return body


def decoder_blocks(model: nn.Module) -> Family:
    """Return the names of a causal LM's parts, checked against the model itself.

    Raises:
        ModelError: if the model does not look as the table says, or is not in it and has no one list of blocks.
    """
    kind = model_type(model)
    family = FAMILIES.get(kind)
    if family is None:
        parts = discovered_parts(model)
        if parts is None:
            raise ModelError(
                f"model.base: expected one list of {num_blocks_of(model)} blocks beside the embeddings, found none in "
                f"{type(model).__name__} ({kind!r}); choose another base"
            )
        return Family(parts.before, parts.blocks, parts.after, discovered_targets(model), parts.head)
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    present = Family(
        before=tuple(name for name in family.before if modules.get(name) is not None),
        blocks=family.blocks,
        after=tuple(name for name in family.after if modules.get(name) is not None),
        targets=family.targets,
        head=family.head,
    )
    _check_parts(model, kind, present, modules)
    return present


def _check_parts(model: Any, kind: str, parts: Family, modules: dict[str, Any]) -> None:
    """Compare the table's names with what the model says of itself."""
    blocks = modules.get(parts.blocks)
    num_blocks = model.config.num_hidden_layers
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != num_blocks:
        raise ModelError(
            f"model.base: expected {num_blocks} blocks at {parts.blocks!r} of this {kind}, {_UNLIKE_TABLE}"
        )
    if not parts.before or modules[parts.before[0]] is not model.get_input_embeddings():
        raise ModelError(
            f"model.base: expected the embeddings of this {kind} at one of {FAMILIES[kind].before}, {_UNLIKE_TABLE}"
        )
    if modules.get(parts.head) is not model.get_output_embeddings():
        raise ModelError(f"model.base: expected the output head of this {kind} at {parts.head!r}, {_UNLIKE_TABLE}")


def default_targets(model_type: str) -> tuple[str, ...]:
    """Return the modules that LoRA adapts in a family by default.

    Query and value projections, as in the papers; the fused projection where a family has one (``c_attn`` in GPT-2).

    Raises:
        ModelError: if the family is not in the table.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"model.target_modules: no default is known for {model_type!r} (known: {', '.join(sorted(FAMILIES))}); "
            f"name the modules, or use {ALL_LINEAR!r}"
        )
    return FAMILIES[model_type].targets


def resolve_targets(model: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Return the full names of the linear layers that the patterns choose, in the model's order.

    A pattern is a module's name or the end of one (``q_proj``, ``self_attn.q_proj``), a glob over full names
    (``model.layers.[0-3].*.v_proj``), a regular expression that matches a full name whole, or ``all-linear``.
    Without patterns the family's defaults are taken, or the query and value projections that the model has.
    These and ``all-linear`` leave out what never sees the text: towers for images, attention to another model.
    The output head is never adapted: the loss reads its weight.

    Raises:
        ModelError: if a pattern matches nothing, or a module that is not a linear layer.
    """
    chosen: set[str] = set()
    leaves, head = _leaves(model), _output_head(model)
    away = beside_text(model)
    reading = {name: module for name, module in leaves.items() if not is_away(name, away)}
    for pattern in _default_patterns(model) if patterns is None else _as_list(patterns):
        matches = _match(pattern, reading if patterns is None or pattern == ALL_LINEAR else leaves, head)
        _check_matches(pattern, matches, leaves, head)
        chosen.update(matches)
    return [name for name in leaves if name in chosen]


def _default_patterns(model: nn.Module) -> Sequence[str]:
    kind = model_type(model)
    return default_targets(kind) if kind in FAMILIES else discovered_targets(model) or default_targets(kind)


def _as_list(patterns: Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name and not any(module.children())}


def _output_head(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _is_linear(module: nn.Module) -> bool:
    """Whether a module computes what a linear layer does; a router of a class of its own may return several things."""
    if not (isinstance(module, nn.Linear) or is_transposed(module)):
        return False
    from transformers.pytorch_utils import Conv1D  # with it come all of transformers' modelling code

    is_plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return is_plain or type(module).__module__.startswith("bitsandbytes") or _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: Any) -> bool:
    """Compare a linear layer of a class of its own with a plain one."""
    try:
        x_TI = torch.linspace(-1, 1, 2 * module.in_features, dtype=module.weight.dtype, device=module.weight.device)
        x_TI = x_TI.view(2, module.in_features)
        found, expected = module(x_TI), affine(x_TI, module.weight, module.bias)
        same_shape = isinstance(found, torch.Tensor) and found.shape == expected.shape
        return same_shape and (found.is_meta or bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-3)))
    except Exception:  # whatever it wants instead, it is no linear layer
        return False


def _match(pattern: str, leaves: dict[str, nn.Module], head: nn.Module | None) -> list[str]:
    """Return the names a pattern chooses: by name if it is one, else as a glob, else as a regular expression."""
    if pattern == ALL_LINEAR:
        return [name for name, module in leaves.items() if _is_linear(module) and module is not head]
    named = [name for name in leaves if f".{name}".endswith(f".{pattern}")]
    if named:
        return named
    globbed = [name for name in leaves if fnmatchcase(name, pattern)]
    if globbed:
        return globbed
    try:
        compiled = re.compile(pattern)
    except re.error:
        return []
    return [name for name in leaves if compiled.fullmatch(name)]


def _check_matches(pattern: str, matches: Sequence[str], leaves: dict[str, nn.Module], head: nn.Module | None) -> None:
    if not matches:
        linear = ", ".join(_last_names(name for name, module in leaves.items() if _is_linear(module)))
        raise ModelError(
            f"model.target_modules: {pattern!r} matches no module; choose from the linear layers: {linear}"
        )
    for name in matches:
        module = leaves[name]
        if module is head:
            raise ModelError(
                f"model.target_modules: {pattern!r} matches {name!r}, the output head, which is frozen; "
                "narrow the pattern"
            )
        if not _is_linear(module):
            kind = type(module).__name__
            raise ModelError(
                f"model.target_modules: expected linear layers, {pattern!r} matches {name!r}, a {kind}; "
                "narrow the pattern"
            )


def _last_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
