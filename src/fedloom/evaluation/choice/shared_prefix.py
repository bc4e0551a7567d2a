"""Score several continuations of many prompts, computing what they share once.

Letters: B rows of a pass, one per prompt; P tokens of the prefix all prompts share; Q tokens of a row after it (rest
of the prompt, then its continuations side by side); S scored tokens.

The prefix goes through the model once and its keys and values serve every row. Within a row the continuations do not
see each other: a mask lets each see the prompt and itself, and positions restart where the prompt ends.

Why: MMLU's five examples are most of every prompt, and four choices repeat it four times. Read once, they cost a small
part of scoring every choice from scratch, with the same numbers to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.tokens import TokenSet
from fedloom.models.causal import causal_lm
from fedloom.models.families import body_of
from fedloom.models.foreign_forward import foreign_forward
from fedloom.training.loss import target_nats
from fedloom.training.rotation import shortest_switch
from fedloom.training.row_losses import row_losses
from fedloom.training.row_passes import row_passes
from fedloom.training.verified_head import output_head

_PROMPT, _PADDING = 0, -1


@dataclass(frozen=True)
class Query:
    """The tokens of a prompt, and those of each continuation to score after it; none of them is empty."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]


def continuation_nats(model: Any, queries: Sequence[Query], *, token_budget: int) -> list[NDArray[np.float64]]:
    """Return for each query the negative log-likelihood of each continuation, in nats.

    A pass holds at most ``token_budget`` tokens, the prefix counted in every row. Where the model's attention cannot
    take a mask of ours (sliding windows shorter than a row, flash attention, a base with padded rows), or rotates a row
    by its length, all are scored from scratch.
    """
    lm = causal_lm(model)
    longest = max(len(query.prompt) + sum(map(len, query.continuations)) for query in queries)
    if not _takes_masks(lm, longest):
        return nats_from_scratch(model, queries, token_budget=token_budget)
    prefix = shared_prefix(queries)
    with torch.inference_mode(), foreign_forward(lm):
        cache = _prefix_cache(lm, prefix)
        nats: list[NDArray[np.float64]] = [np.zeros(len(query.continuations)) for query in queries]
        for members in _passes(queries, token_budget):
            rows = [_Row.of(queries[index], len(prefix)) for index in members]
            for index, found in zip(members, _score(lm, rows, cache, len(prefix)), strict=True):
                nats[index] = found
    return nats


def nats_from_scratch(model: Any, queries: Sequence[Query], *, token_budget: int) -> list[NDArray[np.float64]]:
    """Return what :func:`continuation_nats` does, reading the whole prompt anew for every continuation."""
    pairs = [(query.prompt, words) for query in queries for words in query.continuations]
    rows = TokenSet.from_rows(
        ([*prompt, *words], [False] * len(prompt) + [True] * len(words)) for prompt, words in pairs
    )
    flat = row_losses(model, rows, token_budget=token_budget).sum_nats
    return np.split(flat, np.cumsum([len(query.continuations) for query in queries])[:-1])


def shared_prefix(queries: Sequence[Query]) -> list[int]:
    """Return the tokens all prompts begin with, leaving every prompt at least one of its own."""
    shortest = min(len(query.prompt) for query in queries) - 1
    columns = zip(*(query.prompt[:shortest] for query in queries), strict=True)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


@dataclass(frozen=True)
class _Row:
    """What one query adds after the prefix: tokens, the part and position of each, and where targets are read."""

    ids: list[int]
    parts: list[int]
    positions: list[int]
    read_at: list[int]
    targets: list[int]
    continuation_of_target: list[int]
    num_continuations: int

    @classmethod
    def of(cls, query: Query, skip: int) -> _Row:
        ids = list(query.prompt[skip:])
        parts, positions = [_PROMPT] * len(ids), list(range(skip, len(query.prompt)))
        last_of_prompt = len(ids) - 1
        read_at: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for part, words in enumerate(query.continuations, start=1):
            begin = len(ids)
            # The last token predicts nothing, so it is not read; the first is predicted by the prompt's last token.
            ids.extend(words[:-1])
            parts.extend([part] * (len(words) - 1))
            positions.extend(range(len(query.prompt), len(query.prompt) + len(words) - 1))
            read_at.extend([last_of_prompt, *range(begin, begin + len(words) - 1)])
            targets.extend(words)
            owners.extend([part - 1] * len(words))
        return cls(ids, parts, positions, read_at, targets, owners, len(query.continuations))


def _score(lm: Any, rows: Sequence[_Row], cache: Any | None, prefix_length: int) -> Iterator[NDArray[np.float64]]:
    width = max(len(row.ids) for row in rows)
    head = output_head(lm)
    device = head.weight_VD.device

    def padded(lists: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*values, *[fill] * (width - len(values))] for values in lists], device=device)

    hidden_BQD = body_of(lm)(
        input_ids=padded([row.ids for row in rows], 0),
        position_ids=padded([row.positions for row in rows], 0),
        attention_mask=_mask(padded([row.parts for row in rows], _PADDING), prefix_length, head.weight_VD.dtype),
        past_key_values=_for_rows(cache, len(rows)),
        use_cache=cache is not None,
    ).last_hidden_state
    flat = torch.tensor([b * width + q for b, row in enumerate(rows) for q in row.read_at], device=device)
    targets_S = torch.tensor([target for row in rows for target in row.targets], device=device)
    nats_S = target_nats(hidden_BQD.flatten(0, 1)[flat], head, targets_S).cpu().double().numpy()
    limits = np.cumsum([len(row.targets) for row in rows])[:-1]
    for row, nats in zip(rows, np.split(nats_S, limits), strict=True):
        yield np.bincount(row.continuation_of_target, weights=nats, minlength=row.num_continuations).astype(np.float64)


def _mask(parts_BQ: Tensor, prefix_length: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores, (B, 1, Q, P + Q): 0 where a token may look, else the lowest number."""
    width = parts_BQ.shape[1]
    of_prompt = (parts_BQ == _PROMPT)[:, None, :]
    same_part = parts_BQ[:, :, None] == parts_BQ[:, None, :]
    backwards = torch.ones(width, width, dtype=torch.bool, device=parts_BQ.device).tril()
    may_look = backwards & (of_prompt | same_part)
    prefix = may_look.new_ones(*may_look.shape[:2], prefix_length)
    lowest = torch.finfo(dtype).min
    zero = torch.zeros((), dtype=dtype, device=parts_BQ.device)
    added_BQK = zero.where(torch.cat([prefix, may_look], dim=2), lowest)
    return added_BQK[:, None]


def _prefix_cache(lm: Any, prefix: Sequence[int]) -> Any | None:
    if not prefix:
        return None
    ids = torch.tensor([list(prefix)], device=next(lm.parameters()).device)
    return body_of(lm)(input_ids=ids, use_cache=True).past_key_values


def _for_rows(cache: Any | None, num_rows: int) -> Any | None:
    if cache is None:
        return None
    # A forward appends to the cache it is given, and all passes begin from the same prefix: each gets a copy.
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(num_rows)
    return repeated


def _passes(queries: Sequence[Query], token_budget: int) -> Iterator[list[int]]:
    """Group queries of similar length so that rows times the longest stays within the budget."""
    widths = [len(q.prompt) + sum(len(words) - 1 for words in q.continuations) for q in queries]
    members: list[int] = []
    for index in sorted(range(len(queries)), key=lambda index: -widths[index]):
        if members and (len(members) + 1) * widths[members[0]] > token_budget:
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def _takes_masks(lm: Any, longest: int) -> bool:
    config = lm.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    fits = (not window or longest < window) and longest <= shortest_switch(lm)
    return fits and row_passes(lm).attends_by_mask and config._attn_implementation in {"sdpa", "eager"}
