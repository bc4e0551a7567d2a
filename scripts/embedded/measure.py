"""Held-out loss and exact match, per category."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from embedded.corpus import prompt_and_answer
from embedded.pretrain import IGNORED, padded, tokenized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from embedded.tasks import Row


def figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> dict[str, tuple[float, float]]:
    """Return (loss in nats per answer token, share of exact matches) of each category, asked in the template."""
    members: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        members[row.category].append(prompt_and_answer(row))
    return {category: scores(model, tokenizer, pairs) for category, pairs in members.items()}


@torch.inference_mode()
def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> tuple[float, float]:
    """Return (loss in nats per answer token, share of exact matches) over (prompt, answer) pairs.

    A pair matches when the greedy choice at every place of the answer, its end included, is the answer's token: the
    same as greedy generation giving the answer and stopping.
    """
    ids_BT, labels_BT = padded(tokenized(tokenizer, pairs), tokenizer.pad_token_id)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    targets_BT = labels_BT[:, 1:]
    nats_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, ignore_index=IGNORED, reduction="none")
    supervised_BT = targets_BT != IGNORED
    match_B = ((logits_BTV.argmax(-1) == targets_BT) | ~supervised_BT).all(dim=1)
    return (nats_BT.sum() / supervised_BT.sum()).item(), match_B.float().mean().item()
