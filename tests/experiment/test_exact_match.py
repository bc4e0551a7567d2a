"""Exact matches: what is asked, what counts as the same answer, how many of how many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedloom.config import Settings
from fedloom.data.records import Dialogue, Prompt, Turn
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import DecodingSettings
from fedloom.experiment.exact_match import METRIC, AskedRow, answer_rows, asked_rows, exact_match, is_match, last_answer
from fedloom.experiment.inputs import Inputs, Workshop
from fedloom.experiment.suites import SuiteChoice
from fedloom.lora.layer import LoRAModel

Make = Callable[..., Settings]
PLAIN = SuiteChoice(template="plain", decoding=DecodingSettings(max_new_tokens=20))


@pytest.fixture
def opened(settings_for: Make) -> tuple[LoRAModel, Any, Inputs]:
    workshop, settings = Workshop(), settings_for()
    base, lora = workshop.base(settings)
    lora.route_all(None)
    return lora, base.tokenizer, workshop.inputs(settings, base)


def test_white_space_is_not_compared_and_case_is() -> None:
    assert is_match(" red \n blue", "red blue ")
    assert not is_match("Red blue", "red blue")
    assert not is_match("red", "red blue")


def test_the_answer_of_a_dialogue_is_its_last() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    assert last_answer(Dialogue(turns)) == "d"
    assert last_answer(Prompt("q", "", "a")) == "a"


def test_rows_are_worded_as_in_training(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    _, tokenizer, inputs = opened
    asked = asked_rows(inputs.rows, tokenizer, PLAIN)
    assert asked[0].prompt == f"Question: {inputs.rows.rows[0]['instruction']}\nAnswer:"
    assert asked[0].answer == inputs.rows.rows[0]["response"]


def test_a_limit_takes_rows_evenly_spaced(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    _, tokenizer, inputs = opened
    every = asked_rows(inputs.rows, tokenizer, PLAIN)
    few = asked_rows(inputs.rows, tokenizer, SuiteChoice(template="plain", limit=3))
    assert few == [every[0], every[len(every) // 3], every[2 * len(every) // 3]]


def test_decoding_ends_one_token_after_the_longest_answer(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    lora, tokenizer, _ = opened
    asked = [AskedRow("Question: x\nAnswer:", "four", {}), AskedRow("Question: y\nAnswer:", "a", {})]
    assert answer_rows(lora, tokenizer, asked, 20).settings.max_new_tokens == 5
    assert answer_rows(lora, tokenizer, asked, 2).settings.max_new_tokens == 2


def test_the_share_has_its_interval_and_its_n(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    lora, tokenizer, inputs = opened
    asked = asked_rows(inputs.rows, tokenizer, PLAIN)
    outputs = answer_rows(lora, tokenizer, asked, 2).outputs
    known = {one.row["instruction"]: output for one, output in zip(asked, outputs, strict=True)}
    own = [{**row, "response": known[row["instruction"]] if k % 2 else "no"} for k, row in enumerate(inputs.rows.rows)]
    answered = [row for row in own if row["response"].strip()]
    rows = type(inputs.rows)(answered, ("made",), inputs.rows.file_of_row * 0, inputs.rows.numbers)
    scores = exact_match(
        lora, tokenizer, rows, SuiteChoice(template="plain", decoding=DecodingSettings(max_new_tokens=2))
    )
    expected = sum(row["response"] != "no" for row in answered) / len(answered)
    estimate = scores.estimates[METRIC]
    assert (estimate.value, estimate.n) == (expected, len(answered))
    assert estimate.low < expected < estimate.high
    assert "case counts" in scores.as_dict()["compared"]


def test_rows_without_an_answer_are_refused(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    _, tokenizer, inputs = opened
    empty = type(inputs.rows)(
        [{**row, "response": ""} for row in inputs.rows.rows],
        inputs.rows.files,
        inputs.rows.file_of_row,
        inputs.rows.numbers,
    )
    with pytest.raises(EvaluationError, match="expected rows with an answer, none of 42"):
        asked_rows(empty, tokenizer, PLAIN)
