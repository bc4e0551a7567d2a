"""Whether a model may decode prompts of different lengths in one batch, which pads the shorter ones on the left.

With packed rows a model attends by a mask, so padding is never seen. One that runs its own attention or state may not
read the mask, as recurrent ones do: whether it does is tried once, by what it decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.models.causal import causal_lm
from fedloom.models.foreign_forward import foreign_forward
from fedloom.training.loss import probe_tolerance
from fedloom.training.row_passes import row_passes

_PROBE = ((3, 5, 7, 11, 13), (3, 5))
_NUM_NEW = 2

_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, (B, T), and the mask of what is theirs."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def takes_left_padding(model: Any) -> bool:
    """Return whether a prompt's answer does not depend on padding to its left."""
    lm = causal_lm(model)
    if row_passes(lm).shares_prefixes:
        return True
    if lm not in _TRIED:
        _TRIED[lm] = _is_harmless(lm)
    return _TRIED[lm]


@torch.inference_mode()
def _is_harmless(lm: Any) -> bool:
    """Decode a short prompt beside a long one and alone, and compare the logits as far as the tokens are the same."""
    try:
        together, alone = _decoded(lm, _PROBE)[:, -1], _decoded(lm, _PROBE[-1:])[:, 0]
    except ModelError:  # some cannot decode a batch at all
        return False
    for beside_V, own_V in zip(together, alone, strict=False):
        if not (beside_V - own_V).norm() <= probe_tolerance(lm) * own_V.norm():
            return False
        if beside_V.argmax() != own_V.argmax():
            break
    return True


def _decoded(lm: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of each new token, (G, B, V), in fp32 at least."""
    from transformers import GenerationConfig

    vocabulary = lm.get_output_embeddings().weight.shape[0]
    ids_BT, mask_BT = left_padded([[one % vocabulary for one in row] for row in prompts], 0, lm.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=_NUM_NEW,
        min_new_tokens=_NUM_NEW,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with foreign_forward(lm):
        found = lm.generate(ids_BT, attention_mask=mask_BT, generation_config=config)
    logits_GBV = torch.stack(found.logits)
    return logits_GBV.to(torch.promote_types(logits_GBV.dtype, torch.float32))
