"""What the adapted layers of the first block read of each token, where that is a function of the token alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.lora.layer import LoRAModel
from fedloom.training.packing import Row
from fedloom.training.row_passes import row_passes

_TOKENS_AT_ONCE = 2048
_TOLERANCE = 1e-4


@torch.no_grad()
def inputs_of_tokens(lora: LoRAModel) -> dict[str, Tensor]:
    """Return by module the input (V, I) of every token of the vocabulary, of those modules where nothing else tells.

    Neither the tokens before nor the place in the row may: with learned positions added to the embeddings no module is
    left. It is tried on a few tokens. The base is run without any adapter.
    """
    lora.close()
    lora.set_side(None)
    vocabulary = lora.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    a, b, c = (vocabulary * k // 5 for k in (1, 2, 3))
    with _captured(lora) as seen:
        _pass(lora, [[a, c], [b, c], [c, a]], seen)
        local = [name for name, parts in seen.items() if _is_local(parts)]
        for parts in seen.values():
            parts.clear()
        if not local:
            return {}
        for start in range(0, vocabulary, _TOKENS_AT_ONCE):
            ids = range(start, min(start + _TOKENS_AT_ONCE, vocabulary))
            _pass(lora, [[token] for token in ids], seen, local)
        return {name: torch.cat(seen[name]) for name in local}


def _is_local(rows: Sequence[Tensor]) -> bool:
    """Tell whether the inputs of ``c`` are the same behind ``a``, behind ``b`` and first."""
    behind_a, behind_b, first = rows[0][1], rows[1][1], rows[2][0]
    room = _TOLERANCE * float(first.abs().max())
    return all(float((first - other).abs().max()) <= room for other in (behind_a, behind_b))


def _pass(
    lora: LoRAModel, rows: Sequence[Sequence[int]], seen: dict[str, list[Tensor]], wanted: Sequence[str] | None = None
) -> None:
    """Send rows through the base; ``seen`` then holds their inputs row by row, of the ``wanted`` modules."""
    passes = row_passes(lora.model)
    given: list[Row] = [
        (np.asarray(ids, np.int32), np.asarray([False, *[True] * (len(ids) - 1)], np.bool_)) for ids in rows
    ]
    batch = passes.batch(given, lora.base_weight.device)
    before = {name: len(parts) for name, parts in seen.items()}
    passes.hidden_states(lora.model, batch)
    for name, parts in seen.items():
        whole = parts[before[name] :]
        del parts[before[name] :]
        if wanted is None or name in wanted:
            for one in whole:
                parts.extend(passes.by_row(batch, one))


@contextmanager
def _captured(lora: LoRAModel) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what enters each adapted layer, (N, I) a pass."""
    seen: dict[str, list[Tensor]] = {name: [] for name in lora.layers}

    def collect(name: str) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...]) -> None:
            seen[name].append(given[0].detach().reshape(-1, given[0].shape[-1]).float().cpu())

        return hook

    handles = [layer.register_forward_pre_hook(collect(name)) for name, layer in lora.layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
