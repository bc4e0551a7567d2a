from __future__ import annotations

import pytest

from fedloom.errors import EvaluationError
from fedloom.evaluation.exact_match import Part, compare_matches, exact_match


def test_case_white_space_and_a_full_stop_do_not_count() -> None:
    found = exact_match(["  Blue\nSpice.", "blue", ""], ["blue spice", "Blue Spice", "x"])
    assert found.correct_N.tolist() == [True, False, False]
    assert found.accuracy.n == 3
    assert found.num_without_answer == 1


def test_the_last_number_is_compared_as_a_number() -> None:
    answers = ["2 + 2 = 4\n#### 4", "#### 1,200", "#### -3", "#### 7", "#### 0.5"]
    outputs = ["so it is 4.", "1200.00 dollars", "minus: -3", "no idea", ".5"]
    found = exact_match(outputs, answers, Part.LAST_NUMBER)
    assert found.correct_N.tolist() == [True, True, True, False, True]
    assert found.num_without_answer == 1


def test_a_system_against_itself_is_within_noise() -> None:
    found = exact_match(["a", "b"], ["a", "c"])
    assert not compare_matches(found, found, seed=0, resamples=20).exceeds_noise


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(EvaluationError, match="each of 2 answers, got 1"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(EvaluationError, match=r"answer 2, 'none', has no last-number part"):
        exact_match(["1", "2"], ["1", "none"], "last-number")
