"""Every line of a site's policy refuses, with a code and numbers, and says so in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedloom.sites import policy
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import FORMAT
from fedloom.sites.sheet import Sheet, read_sheet, sheet_of
from fedloom.sites.site_settings import Policy
from fedloom.sites.study import resolve_study

SHA, RUN = "ab" * 32, "0" * 32


def sheet(**changes: Any) -> Sheet:
    document: dict[str, Any] = {
        "sites": {"names": ["a"]},
        "method": {"name": "flora", "ranks": 8},
        "federation": {"num_rounds": 20},
        "training": {"local_steps": 30},
    }
    settings = resolve_study(document, "study.toml").settings
    found = json.loads(sheet_of(settings, 0, RUN, SHA, SHA, scores=True).model_dump_json())
    found["training"] |= {key: value for key, value in changes.items() if key in found["training"]}
    found |= {key: value for key, value in changes.items() if key not in found["training"]}
    return read_sheet(json.dumps(found).encode(), RUN)


def inputs(
    own: Policy, rows: int = 250, longest: int = 50, base: str = SHA, tokenizer: str = SHA, **changes: Any
) -> Any:
    asked = sheet(**changes)
    return policy.of_base(asked, base, tokenizer) or policy.of_inputs(own, asked, rows, longest)


def test_a_study_within_the_policy_is_taken() -> None:
    assert policy.of_sheet(Policy(), sheet()) is None
    assert inputs(Policy()) is None
    assert policy.of_format(FORMAT) is None


@pytest.mark.parametrize(
    ("line", "changes", "code", "numbers"),
    [
        ({"methods": ("fedit",)}, {}, "method", {}),
        ({"bases": ("sha256:" + "cd" * 32,)}, {}, "base-not-allowed", {}),
        ({"max_rank": 4}, {}, "rank", {"asked": 8, "allowed": 4}),
        ({"max_rank": 8}, {"sketch_rank": 16}, "rank", {"asked": 16, "allowed": 8}),
        ({"max_rounds": 19}, {}, "rounds", {"asked": 20, "allowed": 19}),
        ({"max_rounds": 20}, {"start_rounds": 1}, "rounds", {"asked": 21, "allowed": 20}),
        ({"max_steps_per_round": 29}, {}, "steps", {"asked": 30, "allowed": 29}),
        ({"max_tokens_per_pass": 8000}, {}, "tokens", {"asked": 8192, "allowed": 8000}),
        ({"max_tokens_per_pass": 9000}, {"batch_tokens": 9001}, "tokens", {"asked": 9001, "allowed": 9000}),
        ({"max_epsilon": 2.0}, {}, "unhidden", {}),
        ({"unit_column": "patient"}, {"unit_column": "person"}, "units", {}),
        ({"hide_row_count": True}, {"steps": None, "epochs": 1.0}, "rows-hidden", {}),
        ({"sum": "masked"}, {}, "unmasked", {}),
        ({"min_sites_in_sum": 4}, {"sum": {"max_rank": 8, "fewest": 3}}, "sum-few", {"asked": 3, "allowed": 4}),
    ],
)
def test_each_line_refuses_a_sheet_that_goes_beyond_it(
    line: dict[str, Any], changes: dict[str, Any], code: str, numbers: dict[str, int]
) -> None:
    refusal = policy.of_sheet(Policy(**line), sheet(**changes))
    assert refusal is not None
    assert (refusal.code, refusal.numbers) == (code, numbers)
    assert f"policy.{next(iter(line))}" in policy.in_words(refusal)
    assert all(f"{number}" in policy.in_words(refusal) for number in numbers.values())


@pytest.mark.parametrize(
    ("line", "given", "code"),
    [
        ({"min_rows": 251}, {}, "rows"),
        ({"max_steps_per_round": 15}, {"steps": None, "epochs": 1.0, "batch_size": 16}, "steps"),
        ({"max_tokens_per_pass": 9000}, {"longest": 9001}, "tokens"),
        ({}, {"base": "cd" * 32}, "base-differs"),
        ({}, {"tokenizer": "cd" * 32}, "tokenizer-differs"),
    ],
)
def test_what_base_and_rows_show_refuses_too(line: dict[str, Any], given: dict[str, Any], code: str) -> None:
    refusal = inputs(Policy(**line), **given)
    assert refusal.code == code
    words = policy.in_words(refusal)
    assert "{" not in words
    if code.endswith("differs"):
        assert "abababababab" in words
        assert "cdcdcdcdcdcd" in words


def test_every_line_of_the_policy_has_a_test_here_or_where_it_acts() -> None:
    here = {"methods", "bases", "max_rank", "max_rounds", "max_steps_per_round", "max_tokens_per_pass", "min_rows"}
    here |= {"hide_row_count", "row_cap", "max_epsilon", "sum", "min_sites_in_sum", "unit_column"}
    assert set(Policy.model_fields) == here | {"max_message_mib", "confirm", "split", "delta"}


def test_hidden_rows_are_hundreds_and_capped() -> None:
    own = Policy(hide_row_count=True, row_cap=1000, min_rows=300)
    assert [policy.told_rows(own, rows) for rows in (1, 99, 100, 250, 999, 5000)] == [1, 1, 100, 200, 900, 1000]
    assert policy.told_rows(Policy(), 257) == 257
    assert inputs(own, rows=250).numbers == {"allowed": 300, "rows": 200}


def test_another_format_is_refused_by_both_numbers() -> None:
    refusal = policy.of_format(FORMAT + 1)
    assert refusal is not None
    assert f"format {FORMAT + 1}, it has {FORMAT}" in policy.in_words(refusal)


def test_a_code_of_a_newer_version_and_one_without_its_numbers_are_shown_as_they_are() -> None:
    assert policy.in_words(Refusal(code="new-reason")) == "it refuses: new-reason"
    assert policy.in_words(Refusal(code="rank")) == "it refuses: rank"
