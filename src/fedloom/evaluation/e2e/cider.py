"""CIDEr in its D form, as the COCO caption code computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.evaluation.e2e.ngrams import Ngram, Words, count_ngrams
from fedloom.evaluation.intervals import Statistics

ORDER = 4
SIGMA = 6.0


def cider_d(references: Sequence[Sequence[Words]], outputs: Sequence[Words]) -> Statistics:
    """Return the CIDEr-D of each item, (N,); the corpus score is their mean.

    10 · mean over n = 1..4 and over references of exp(−(l − l_ref)² / 2σ²) · min(g, g_ref) · g_ref / (|g| |g_ref|),
    where g is the tf-idf vector of order n, idf = log(number of items / items whose references hold the n-gram), σ = 6.

    Source: Vedantam et al. 2015; the caption code's conventions (lengths are counted in bigrams).
    """
    counted = [[count_ngrams(words, ORDER) for words in texts] for texts in references]
    holders: Counter[Ngram] = Counter()
    for texts in counted:
        holders.update(set().union(*texts))
    log_items = math.log(len(references))
    vectors = ([_vector(text, holders, log_items) for text in texts] for texts in counted)
    hypotheses = (_vector(count_ngrams(words, ORDER), holders, log_items) for words in outputs)
    pairs = zip(vectors, hypotheses, strict=True)
    return np.array([10 * sum(_similarity(output, text) for text in texts) / len(texts) for texts, output in pairs])


@dataclass(frozen=True)
class _Vector:
    weights: dict[Ngram, float]
    norms: tuple[float, ...]
    num_bigrams: int


def _vector(counts: Counter[Ngram], holders: Counter[Ngram], log_items: float) -> _Vector:
    weights = {ngram: count * (log_items - math.log(max(1, holders[ngram]))) for ngram, count in counts.items()}
    squares = [0.0] * ORDER
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight * weight
    num_bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
    return _Vector(weights, tuple(map(math.sqrt, squares)), num_bigrams)


def _similarity(output: _Vector, text: _Vector) -> float:
    products = [0.0] * ORDER
    for ngram, weight in output.weights.items():
        if (other := text.weights.get(ngram)) is not None:
            products[len(ngram) - 1] += min(weight, other) * other
    norms = [a * b for a, b in zip(output.norms, text.norms, strict=True)]
    cosine = sum(product / norm if norm else product for product, norm in zip(products, norms, strict=True)) / ORDER
    return cosine * math.exp(-((output.num_bigrams - text.num_bigrams) ** 2) / (2 * SIGMA**2))
