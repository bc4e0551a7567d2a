"""Which prompts a model may decode in one batch, where those that are shorter are padded on the left.

With packed rows a model attends by a mask, so padding is never seen. One that runs its own attention or state may not
read the mask, as recurrent ones do, or mix the rows of a batch: what it decodes in company is compared with what it
decodes alone, once for a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedloom.data.token_rows import PromptTokens
from fedloom.errors import ModelError
from fedloom.models.causal import causal_lm
from fedloom.models.foreign_forward import foreign_forward
from fedloom.training.row_passes import row_passes
from fedloom.training.verified_head import probe_tolerance

_LONG, _AS_LONG, _SHORT = (3, 5, 7, 11, 13), (17, 19, 23, 29, 31), (3, 5)
_NUM_NEW = 3


class Sharing(StrEnum):
    """Which prompts share a batch."""

    ANY = "any"
    ONE_LENGTH = "those of one length"
    NONE = "none"


_FOUND: WeakKeyDictionary[nn.Module, Sharing] = WeakKeyDictionary()


def prompt_batches(model: Any, longest_first: Sequence[PromptTokens], size: int) -> Iterator[list[PromptTokens]]:
    """Yield the prompts in their order, up to ``size`` at a time of those that may share a batch."""
    match sharing_of(model):
        case Sharing.ANY:
            groups = [list(longest_first)]
        case Sharing.ONE_LENGTH:
            groups = [list(alike) for _, alike in groupby(longest_first, key=lambda prompt: len(prompt.ids))]
        case Sharing.NONE:
            groups = [[prompt] for prompt in longest_first]
    for group in groups:
        yield from (group[start : start + size] for start in range(0, len(group), size))


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, (B, T), and the mask of what is theirs."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.inference_mode()
def sharing_of(model: Any) -> Sharing:
    """Return which prompts a model decodes together as it does alone."""
    lm = causal_lm(model)
    if row_passes(lm).attends_by_mask:
        return Sharing.ANY
    if lm not in _FOUND:
        if _decodes_as_alone(lm, (_LONG, _SHORT)):
            _FOUND[lm] = Sharing.ANY
        else:
            _FOUND[lm] = Sharing.ONE_LENGTH if _decodes_as_alone(lm, (_LONG, _AS_LONG)) else Sharing.NONE
    return _FOUND[lm]


@torch.inference_mode()
def let_go(model: Any) -> None:
    """Let a model drop what its modules keep of the batch before, as RecurrentGemma's do of the last convolution."""
    lm = causal_lm(model)
    if not row_passes(lm).attends_by_mask:
        with foreign_forward(lm):
            lm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=lm.device), use_cache=False)


def _decodes_as_alone(lm: Any, prompts: Sequence[Sequence[int]]) -> bool:
    """Compare the logits of each prompt's new tokens with those it has alone, as far as the tokens are the same."""
    try:
        together = _decoded(lm, prompts)
        alone = [_decoded(lm, [prompt])[:, 0] for prompt in prompts]
    except ModelError:  # some cannot decode a batch at all
        return False
    for row, own_GV in enumerate(alone):
        for beside_V, own_V in zip(together[:, row], own_GV, strict=True):
            if not (beside_V - own_V).norm() <= probe_tolerance(lm) * own_V.norm():
                return False
            if beside_V.argmax() != own_V.argmax():
                break
    return True


def _decoded(lm: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of each new token, (G, B, V), in fp32 at least."""
    from transformers import GenerationConfig

    let_go(lm)
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
