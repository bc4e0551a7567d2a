"""Count decoded answers that are the right ones: the same text, or a text that ends on the same number."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import EvaluationError
from fedloom.evaluation.intervals import Estimate, ItemStatistics, ratio, ratio_statistics, wilson

METRIC = "exact_match"
MARK = "####"
"""What GSM8K writes before the number that is the answer."""
# A minus after a word or a digit is a dash or a subtraction; a comma counts only between groups of three digits.
_NUMBER = re.compile(r"(?:(?<!\w)[-−]\$?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


class Part(StrEnum):
    """Which part of a text is compared."""

    WHOLE = "whole"
    """All of it; a run of white space is one blank, outer ones are cut, case counts."""
    LAST_NUMBER = "last-number"
    """The number it ends on: the first one after ``####`` where that is written, else the last one, by its value."""


@dataclass(frozen=True)
class ExactMatch:
    """The share of right answers, and which they are; ``num_without_answer`` outputs had nothing to compare."""

    accuracy: Estimate
    num_without_answer: int
    correct_N: NDArray[np.bool_] = field(repr=False, compare=False)

    @property
    def items(self) -> Mapping[str, ItemStatistics]:
        """What each item adds to the share, for a paired comparison."""
        return {METRIC: ItemStatistics(ratio_statistics(self.correct_N), ratio)}


def score_matches(outputs: Sequence[str], answers: Sequence[str], part: Part | str = Part.WHOLE) -> ExactMatch:
    """Compare each output with its right answer; an output without the part compared is never right.

    Raises:
        EvaluationError: the numbers differ, or a right answer has nothing to compare with.
    """
    part = Part(part)
    if len(outputs) != len(answers):
        raise EvaluationError(f"expected one output for each of {len(answers)} answers, got {len(outputs)}")
    for number, answer in enumerate(answers, start=1):
        if not has_part(answer, part):
            raise EvaluationError(
                f"answer {number}: expected a text with a {part} part, got {answer[:60]!r}; remove the item"
            )
    pairs = zip(outputs, answers, strict=True)
    correct_N = np.array([is_match(output, answer, part) for output, answer in pairs], dtype=bool)
    num_without = sum(not has_part(output, part) for output in outputs)
    return ExactMatch(wilson(int(correct_N.sum()), len(answers)), num_without, correct_N)


def is_match(output: str, answer: str, part: Part = Part.WHOLE) -> bool:
    """Tell whether both texts have the part compared, and it is the same."""
    return has_part(output, part) and _compared(output, part) == _compared(answer, part)


def has_part(text: str, part: Part) -> bool:
    """Tell whether there is anything to compare: a character, or a number."""
    return _compared(text, part) is not None


def _compared(text: str, part: Part) -> str | Decimal | None:
    match part:
        case Part.WHOLE:
            return " ".join(text.split()) or None
        case Part.LAST_NUMBER:
            return _last_number(text)
        case _:
            assert_never(part)


def _last_number(text: str) -> Decimal | None:
    """Return the first number after the first ``####``, without that mark the last number; None where there is none.

    Source: GSM8K (arXiv 2110.14168), whose release reads the first number after the mark.
    """
    before, mark, after = text.partition(MARK)
    found = _NUMBER.findall(after)[:1] if mark else _NUMBER.findall(before)[-1:]
    return Decimal(found[0].replace(",", "").replace("$", "").replace("−", "-")) if found else None
