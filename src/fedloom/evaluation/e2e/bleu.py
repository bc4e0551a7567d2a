"""BLEU and NIST as mteval-v13a computes them, from one pass over the n-grams.

Letters: N items, S statistics of one item. Words come from :func:`fedloom.evaluation.e2e.tokenisers.mteval_words`.
Both scores are functions of sums over items, so :mod:`fedloom.evaluation.intervals` can resample them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedloom.evaluation.e2e.ngrams import Ngram, Words, count_ngrams, most_in_one
from fedloom.evaluation.intervals import Statistics

BLEU_ORDER = 4
NIST_ORDER = 5
_NIST_BETA = -math.log(2) / math.log(1.5) ** 2  # a text two thirds as long as its references counts half


def bleu_and_nist_statistics(
    references: Sequence[Sequence[Words]], outputs: Sequence[Words]
) -> tuple[Statistics, Statistics]:
    """Return what BLEU (N, 10) and NIST (N, 14) sum over items.

    BLEU: clipped matches of order 1-4, output n-grams of order 1-4, output words, words of the closest reference
    (the shorter of two equally close). NIST: information of clipped matches of order 1-5, output n-grams of order 1-5,
    output words, words of all references, number of references, 1.

    Source: Papineni et al. 2002; Doddington 2002; the conventions of mteval-v13a.
    """
    counted = [[count_ngrams(words, NIST_ORDER) for words in texts] for texts in references]
    information = _information(counted)
    bleu_rows, nist_rows = [], []
    for texts, counts, words in zip(references, counted, outputs, strict=True):
        output = count_ngrams(words, NIST_ORDER)
        matched = output & most_in_one(counts)
        lengths = [len(text) for text in texts]
        totals = [max(0, len(words) - n) for n in range(NIST_ORDER)]
        closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
        bleu_rows.append([*_by_order(matched, None)[:BLEU_ORDER], *totals[:BLEU_ORDER], len(words), closest])
        nist_rows.append([*_by_order(matched, information), *totals, len(words), sum(lengths), len(lengths), 1])
    return np.array(bleu_rows, dtype=np.float64), np.array(nist_rows, dtype=np.float64)


def bleu(sums: Statistics) -> Statistics:
    """Return BLEU in [0, 1] from statistics summed over items, (..., 10) -> (...).

    exp(min(0, 1 − r/c)) · (Π_n p_n)^(1/4); an order without a match counts 1/2, then 1/4, ... of a match, as in mteval.
    """
    matches, totals = sums[..., :BLEU_ORDER], sums[..., BLEU_ORDER : 2 * BLEU_ORDER]
    halvings = np.cumsum(matches == 0, axis=-1)
    smoothed = np.where(matches == 0, 0.5**halvings, matches)
    length, closest = sums[..., -2], sums[..., -1]
    log_precision = np.log(smoothed / np.maximum(totals, 1)).mean(axis=-1)
    log_brevity = np.minimum(0.0, 1 - closest / np.maximum(length, 1))
    usable = (matches[..., 0] > 0) & (totals > 0).all(axis=-1)
    return np.where(usable, np.exp(log_precision + log_brevity), 0.0)


def nist(sums: Statistics) -> Statistics:
    """Return NIST from statistics summed over items, (..., 14) -> (...).

    Σ_n information of matched n-grams / output n-grams, times exp(β ln² min(1, c / r)) with c output words and
    r = items · (words of all references / number of references): every reference counts alike, whatever its item.
    """
    information, totals = sums[..., :NIST_ORDER], sums[..., NIST_ORDER : 2 * NIST_ORDER]
    length, reference_words, num_references, num_items = np.moveaxis(sums[..., 2 * NIST_ORDER :], -1, 0)
    share = length * num_references / np.maximum(num_items * reference_words, 1)
    penalty = np.exp(_NIST_BETA * np.log(np.clip(share, 1e-9, 1.0)) ** 2)
    return np.asarray((information / np.maximum(totals, 1)).sum(axis=-1) * penalty)


def _information(references: Sequence[Sequence[Counter[Ngram]]]) -> dict[Ngram, float]:
    """Return log2(count of the first n − 1 words / count of the n words) over all references (n = 1: of all words)."""
    counts: Counter[Ngram] = Counter()
    for texts in references:
        for text in texts:
            counts.update(text)
    num_words = sum(count for ngram, count in counts.items() if len(ngram) == 1)
    return {ngram: math.log2((counts[ngram[:-1]] or num_words) / count) for ngram, count in counts.items()}


def _by_order(matched: Counter[Ngram], information: dict[Ngram, float] | None) -> list[float]:
    """Sum matches, or their information, by the length of the n-gram."""
    sums = [0.0] * NIST_ORDER
    for ngram, count in matched.items():
        sums[len(ngram) - 1] += count if information is None else count * information[ngram]
    return sums
