from __future__ import annotations

import pytest

from fedloom.errors import EvaluationError
from fedloom.evaluation.exact_match import METRIC, Part, is_match, score_matches
from fedloom.evaluation.intervals import paired_differences


def test_of_whole_texts_white_space_is_not_compared_and_case_is() -> None:
    found = score_matches(["  Blue\nSpice", "blue spice", "Blue", ""], ["Blue Spice"] * 4)
    assert found.correct_N.tolist() == [True, False, False, False]
    assert (found.accuracy.value, found.accuracy.n, found.num_without_answer) == (0.25, 4, 1)


def test_the_last_number_is_compared_as_a_number() -> None:
    answers = ["2 + 2 = 4\n#### 4", "#### 1,200", "#### -3", "#### 7", "#### 0.5", "#### -5"]
    outputs = ["so it is 4.", "1200.00 dollars", "minus: -3", "no idea", ".5", "-$5"]
    found = score_matches(outputs, answers, Part.LAST_NUMBER)
    assert found.correct_N.tolist() == [True, True, True, False, True, True]
    assert found.num_without_answer == 1


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("#### 7\nQuestion: 2 + 2?", "7"),  # what is written after the answer does not replace it
        ("10-3", "3"),  # a subtraction is no negative number
        ("pages 2–4, 5-6", "6"),
        ("1,2,3", "3"),  # a list is no number with thousands
        ("12,3456", "3456"),
        ("12345678", "12345678"),
    ],
)
def test_the_number_a_text_ends_on_is_read_as_a_person_would(output: str, answer: str) -> None:
    assert is_match(output, f"#### {answer}", Part.LAST_NUMBER)


@pytest.mark.parametrize(("output", "answer"), [("12345678", "12345679"), ("7 ####", "7"), ("", "7"), ("7 or 8", "7")])
def test_another_number_or_none_is_not_right(output: str, answer: str) -> None:
    assert not is_match(output, answer, Part.LAST_NUMBER)


def test_a_system_against_itself_is_within_noise_and_a_better_one_is_not() -> None:
    good, bad = score_matches(["a"] * 9, ["a"] * 9), score_matches(["b"] * 9, ["a"] * 9)
    assert not paired_differences(good.items, good.items, seed=0, resamples=20)[METRIC].exceeds_noise
    assert paired_differences(good.items, bad.items, seed=0, resamples=20)[METRIC].value == 1.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(EvaluationError, match="each of 2 answers, got 1"):
        score_matches(["a"], ["a", "b"])
    with pytest.raises(EvaluationError, match=r"answer 2: expected a text with a last-number part, got 'none'"):
        score_matches(["1", "2"], ["1", "none"], "last-number")
