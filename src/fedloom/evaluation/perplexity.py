"""Perplexity as nats per token, byte and word, so that models with different tokenizers compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.data.token_rows import content_encodings, prefix_ids
from fedloom.data.tokens import TokenSet
from fedloom.errors import EvaluationError
from fedloom.evaluation.intervals import Difference, Estimate, bootstrap, bootstrap_difference, ratio, ratio_statistics
from fedloom.models.causal import context_length
from fedloom.training.row_losses import row_losses

Unit = Literal["token", "byte", "word"]


@dataclass(frozen=True)
class RowCounts:
    """Per row: nats of its supervised tokens, and how many tokens, bytes and words they spell."""

    nats_N: NDArray[np.float64]
    token_N: NDArray[np.int64]
    byte_N: NDArray[np.int64]
    word_N: NDArray[np.int64]


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood in nats per unit, each with its interval over rows, and the counts behind them."""

    nats_per_token: Estimate
    nats_per_byte: Estimate
    nats_per_word: Estimate
    num_rows: int
    num_loss_tokens: int
    num_bytes: int
    num_words: int
    rows: RowCounts = field(repr=False, compare=False)

    @property
    def per_token(self) -> float:
        """Return exp(nats per token), the usual perplexity."""
        return math.exp(self.nats_per_token.value)


def measure_perplexity(
    model: Any,
    rows: TokenSet,
    texts: Sequence[str],
    *,
    seed: int,
    token_budget: int = 8192,
    resamples: int = 1000,
) -> Perplexity:
    """Measure how well the model (or what a ``LoRAModel`` is routed to) predicts the supervised tokens of ``rows``.

    ``texts[i]`` is the text the supervised tokens of row i spell: its UTF-8 bytes and white-space words are counted. An
    end-of-text token costs its nats and counts as no byte.

    Raises:
        EvaluationError: rows and texts differ in number, or nothing is supervised.
    """
    if len(rows) != len(texts):
        raise EvaluationError(f"expected one text for each of {len(rows)} rows, got {len(texts)}")
    if not any(text.strip() for text in texts):
        raise EvaluationError(
            "expected a row with text to predict, got none: check the rows and what is supervised in them"
        )
    losses = row_losses(model, rows, token_budget=token_budget)
    counts = RowCounts(
        losses.sum_nats,
        losses.num_loss_tokens,
        np.array([len(text.encode()) for text in texts]),
        np.array([len(text.split()) for text in texts]),
    )

    def per(units_N: NDArray[np.int64]) -> Estimate:
        return bootstrap(ratio_statistics(counts.nats_N, units_N), ratio, seed=seed, resamples=resamples)

    return Perplexity(
        nats_per_token=per(counts.token_N),
        nats_per_byte=per(counts.byte_N),
        nats_per_word=per(counts.word_N),
        num_rows=len(rows),
        num_loss_tokens=int(counts.token_N.sum()),
        num_bytes=int(counts.byte_N.sum()),
        num_words=int(counts.word_N.sum()),
        rows=counts,
    )


def compare_perplexity(
    first: Perplexity, second: Perplexity, *, seed: int, unit: Unit = "byte", resamples: int = 1000
) -> Difference:
    """Return how many nats per unit the first model needs more than the second on the same rows (less is better).

    Raises:
        EvaluationError: the two were not measured on the same texts.
    """
    if not np.array_equal(first.rows.byte_N, second.rows.byte_N):
        raise EvaluationError(
            "expected both models on the same texts, in the same order, got other lengths: measure both on one file"
        )
    first_NS, second_NS = (
        ratio_statistics(side.rows.nats_N, getattr(side.rows, f"{unit}_N")) for side in (first, second)
    )
    return bootstrap_difference(first_NS, second_NS, ratio, seed=seed, resamples=resamples)


def plain_text_rows(model: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[TokenSet, list[str]]:
    """Cut plain texts into rows the model's context holds, every token supervised, and the text of each row.

    Each row begins with what the tokenizer puts first, else with the end of text, so that every token of the text is
    predicted. Rows of one text do not overlap.

    Raises:
        EvaluationError: there is no text.
    """
    prefix = prefix_ids(tokenizer) or [tokenizer.eos_token_id]
    room = (context_length(model) or 1024) - len(prefix)
    rows: list[tuple[list[int], list[bool]]] = []
    spelled: list[str] = []
    for text in (text for text in texts if text):
        [encoding] = content_encodings([text], tokenizer)
        ids, offsets = encoding.ids, encoding.offsets
        starts = range(0, len(ids), room)
        limits = [0, *(offsets[start][0] for start in starts[1:]), len(text)]
        for start, (begin, end) in zip(starts, pairwise(limits), strict=True):
            part = ids[start : start + room]
            rows.append(([*prefix, *part], [False] * len(prefix) + [True] * len(part)))
            spelled.append(text[begin:end])
    if not rows:
        raise EvaluationError("expected at least one text that is not empty, got none; check the file of texts")
    return TokenSet.from_rows(rows), spelled
