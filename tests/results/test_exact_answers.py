"""Exact matches and last numbers: what is asked, how long is decoded, how many of how many."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.assembly.inputs import Inputs, Workshop
from fedloom.config import Settings
from fedloom.data.records import Dialogue, Prompt, Turn
from fedloom.data.sources import Rows
from fedloom.errors import EvaluationError
from fedloom.evaluation.decoding import DecodingSettings, decode
from fedloom.evaluation.exact_match import METRIC
from fedloom.evaluation.outputs_file import OutputsFile
from fedloom.lora.layer import LoRAModel
from fedloom.results.exact_answers import (
    AskedRow,
    answer_settings,
    asked_rows,
    exact_match,
    kept_outputs,
    last_answer,
    last_number,
)
from fedloom.results.suites import SuiteChoice

Make = Callable[..., Settings]
PLAIN = SuiteChoice(template="plain", decoding=DecodingSettings(max_new_tokens=20))


@pytest.fixture
def opened(settings_for: Make) -> tuple[LoRAModel, Any, Inputs]:
    workshop, settings = Workshop(), settings_for()
    base, lora = workshop.base(settings)
    lora.route_all(None)
    return lora, base.tokenizer, workshop.inputs(settings, base)


def with_answers(rows: Rows, answers: list[str]) -> Rows:
    """Return as many of the rows as there are answers, with these in the place of their own."""
    own = [{**row, "response": answer} for row, answer in zip(rows.rows, answers, strict=False)]
    return Rows(own, rows.files, rows.file_of_row[: len(own)], rows.numbers[: len(own)])


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
    _, tokenizer, _ = opened
    asked = [AskedRow("Question: x\nAnswer:", "four", {}), AskedRow("Question: y\nAnswer:", "a", {})]
    assert answer_settings(tokenizer, asked, 20).max_new_tokens == 5
    assert answer_settings(tokenizer, asked, 2).max_new_tokens == 2


def test_the_share_has_its_interval_and_its_n(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    lora, tokenizer, inputs = opened
    asked = asked_rows(inputs.rows, tokenizer, PLAIN)
    outputs = decode(lora, tokenizer, [one.prompt for one in asked], answer_settings(tokenizer, asked, 2)).outputs
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
    assert scores.as_dict()["num_rows_without_answer"] == len(own) - len(answered)
    assert "items" not in scores.as_dict()


def test_every_group_of_rows_has_its_own_share(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    lora, tokenizer, inputs = opened
    choice = replace(PLAIN, limit=12, group_by="category")
    scores = exact_match(lora, tokenizer, inputs.rows, choice)
    groups = scores.groups
    assert set(groups) <= {"colours", "numbers", "animals"}
    assert sum(one.n for one in groups.values()) == 12
    assert sum(one.n * one.value for one in groups.values()) == pytest.approx(12 * scores.estimates[METRIC].value)
    assert scores.as_dict()["per_group"].keys() == groups.keys()
    assert any(line.startswith("  colours") for line in scores.lines())


def test_what_is_answered_is_kept_and_not_decoded_again(opened: tuple[LoRAModel, Any, Inputs], tmp_path: Path) -> None:
    lora, tokenizer, inputs = opened
    choice, stem = replace(PLAIN, limit=4), tmp_path / "exact-match-round1"
    asked = asked_rows(inputs.rows, tokenizer, choice)
    with pytest.raises(EvaluationError, match="expected the outputs of 4 rows, 4 are missing"):
        kept_outputs(stem, tokenizer, asked, choice)
    first = exact_match(lora, tokenizer, inputs.rows, choice, outputs=stem)
    kept = kept_outputs(stem, tokenizer, asked, choice)
    assert len(kept) == 4
    (file,) = tmp_path.iterdir()
    header = json.loads(file.read_text().splitlines()[0])
    file.unlink()
    answered = OutputsFile.open(file, DecodingSettings(**header["settings"]), header["model"])
    answered.append([(one.prompt, one.answer, False) for one in asked])
    again = exact_match(lora, tokenizer, inputs.rows, choice, outputs=stem)
    assert first.estimates[METRIC].value < again.estimates[METRIC].value == 1.0


def test_numbers_are_looked_for_in_as_many_tokens_as_the_choice_allows(
    opened: tuple[LoRAModel, Any, Inputs], tmp_path: Path
) -> None:
    lora, tokenizer, inputs = opened
    rows = with_answers(inputs.rows, ["#### 1,000", "half of 4 is\n#### 2"])
    scores = last_number(lora, tokenizer, rows, PLAIN, outputs=tmp_path / "outputs")
    file = tmp_path / "outputs-tokens20.jsonl"
    found = scores.as_dict()
    assert (scores.estimates[METRIC].n, found["max_new_tokens"]) == (2, 20)
    assert found["num_outputs_without_number"] == sum(
        not any(character.isdigit() for character in json.loads(line)["output"])
        for line in file.read_text().splitlines()[1:]
    )


def test_an_answer_without_a_number_is_refused_with_its_place(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    lora, tokenizer, inputs = opened
    with pytest.raises(
        EvaluationError, match=r"rows.json row \d+: expected an answer that ends on a number, got 'two'"
    ):
        last_number(lora, tokenizer, with_answers(inputs.rows, ["2", "two"]), replace(PLAIN, limit=2))


def test_rows_without_an_answer_are_refused(opened: tuple[LoRAModel, Any, Inputs]) -> None:
    _, tokenizer, inputs = opened
    empty = type(inputs.rows)(
        [{**row, "response": ""} for row in inputs.rows.rows],
        inputs.rows.files,
        inputs.rows.file_of_row,
        inputs.rows.numbers,
    )
    with pytest.raises(EvaluationError, match="expected rows with an answer, got none in 42"):
        asked_rows(empty, tokenizer, PLAIN)
