"""ROUGE_L of one text against several references, as the COCO caption code computes it."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.evaluation.e2e.ngrams import Words

BETA = 1.2


def rouge_l(references: Sequence[Words], output: Words) -> float:
    """Return (1 + β²) P R / (R + β² P) with β = 1.2.

    P = max over references of LCS / output words, R = max of LCS / reference words: the two maxima may come from
    different references.

    Source: Lin 2004; the caption code's reading of it.
    """
    if not output:
        return 0.0
    common = [(_longest_common_subsequence(text, output), len(text)) for text in references if text]
    precision = max((length / len(output) for length, _ in common), default=0.0)
    recall = max((length / size for length, size in common), default=0.0)
    if precision == 0.0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(first: Words, second: Words) -> int:
    """Return the length of the longest common subsequence, one machine word of the first text at a time.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(first) - row.bit_count()
