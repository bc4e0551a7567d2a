"""What a model without numbers shows: whether its rows can pass, told before any weight is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_never

import numpy as np
import torch

from fedloom.errors import ModelError
from fedloom.models.families import model_type
from fedloom.models.row_attention import USE_PADDED, Attention
from fedloom.training.attention import layout
from fedloom.training.output_head import read_output_head
from fedloom.training.packing import hidden_states, pack
from fedloom.training.verified_head import PROBE_LENGTHS

_ATTENDING = ("attention", "full", "sliding", "chunked")
"""What the kinds of layers that attend have in their names; linear attention is a state instead."""


def check_passes(model: Any, attention: Attention) -> None:
    """Reject a model on the meta device whose rows cannot pass as ``attention`` says.

    What :func:`~fedloom.training.verified_head.output_head` finds when it is loaded decides.

    Raises:
        ModelError: naming the family and what it has.
    """
    match attention:
        case "packed":
            check_runs_packed(model)
        case "padded":
            pass  # its own forward is run as it is: without numbers there is nothing to compare
        case _:
            assert_never(attention)
    read_output_head(model)


@torch.no_grad()
def check_runs_packed(model: Any) -> None:
    """Reject a model on the meta device that cannot attend sample by sample.

    A forward that needs numbers cannot be followed there: such a model passes.

    Raises:
        ModelError: naming the family and what it has.
    """
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    _refuse_foreign(model, [kind for kind in dict.fromkeys(map(str, kinds)) if not _attends(kind)])
    batch = pack([(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in PROBE_LENGTHS], "meta")
    batch = replace(batch, layout=layout(batch.lengths))
    try:
        hidden_states(model, batch)
    except ModelError as error:
        # An error of the model's own code may be for want of numbers: it counts only where its own way works.
        if error.__cause__ is not None and not _runs_alone(model):
            return
        raise
    if not batch.layout.attended:
        _refuse_foreign(model, ["attention of its own"])


def _attends(kind: str) -> bool:
    return "linear" not in kind and any(name in kind for name in _ATTENDING)


def _refuse_foreign(model: Any, kinds: list[str]) -> None:
    if kinds:
        raise ModelError(
            f"model.base: expected layers that attend through transformers' attention interface, {model_type(model)!r} "
            f"has {', '.join(kinds)}, which packed rows do not support; {USE_PADDED}"
        )


def _runs_alone(model: Any) -> bool:
    try:
        model(input_ids=torch.zeros(1, PROBE_LENGTHS[0], dtype=torch.long, device="meta"), use_cache=False)
    except Exception:
        return False
    return True
