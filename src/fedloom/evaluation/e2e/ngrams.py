"""Count runs of words; shared by BLEU, NIST and CIDEr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

Words = Sequence[str]
Ngram = tuple[str, ...]


def count_ngrams(words: Words, longest: int) -> Counter[Ngram]:
    """Count every run of 1 to ``longest`` words."""
    words = tuple(words)
    return Counter(words[i : i + n] for n in range(1, longest + 1) for i in range(len(words) - n + 1))


def most_in_one(counts: Iterable[Counter[Ngram]]) -> Counter[Ngram]:
    """Return for each n-gram its largest count in any one text: the clip of BLEU and NIST."""
    most: Counter[Ngram] = Counter()
    for one in counts:
        most |= one
    return most
