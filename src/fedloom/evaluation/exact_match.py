"""Count decoded answers that are exactly the right ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import EvaluationError
from fedloom.evaluation.intervals import Difference, Estimate, bootstrap_difference, ratio, ratio_statistics, wilson

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class Part(StrEnum):
    """Which part of a text is compared."""

    WHOLE = "whole"
    """All of it, without regard to case, white space and a closing full stop."""
    LAST_NUMBER = "last-number"
    """The number it ends on, as GSM8K's answers do after ``####``; a text without one is never right."""


@dataclass(frozen=True)
class ExactMatch:
    """The share of right answers, and which they are."""

    accuracy: Estimate
    num_without_answer: int
    correct_N: NDArray[np.bool_] = field(repr=False, compare=False)


def exact_match(outputs: Sequence[str], answers: Sequence[str], part: Part | str = Part.WHOLE) -> ExactMatch:
    """Compare each output with its right answer.

    Raises:
        EvaluationError: the numbers differ, or a right answer has nothing to compare with.
    """
    if len(outputs) != len(answers):
        raise EvaluationError(f"expected one output for each of {len(answers)} answers, got {len(outputs)}")
    right = [_compared(answer, Part(part)) for answer in answers]
    if "" in right:
        raise EvaluationError(
            f"answer {right.index('') + 1}, {answers[right.index('')][:60]!r}, has no {Part(part)} part"
        )
    found = [_compared(output, Part(part)) for output in outputs]
    correct_N = np.array([one == other for one, other in zip(found, right, strict=True)], dtype=bool)
    return ExactMatch(wilson(int(correct_N.sum()), len(answers)), found.count(""), correct_N)


def compare_matches(first: ExactMatch, second: ExactMatch, *, seed: int, resamples: int = 1000) -> Difference:
    """Return how much more often the first system is right, paired over items."""
    first_NS, second_NS = (ratio_statistics(side.correct_N) for side in (first, second))
    return bootstrap_difference(first_NS, second_NS, ratio, seed=seed, resamples=resamples)


def _compared(text: str, part: Part) -> str:
    match part:
        case Part.WHOLE:
            return " ".join(text.lower().split()).removesuffix(".")
        case Part.LAST_NUMBER:
            numbers = _NUMBER.findall(text)
            return f"{float(numbers[-1].replace(',', '')):g}" if numbers else ""
        case _:
            assert_never(part)
