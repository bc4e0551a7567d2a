"""Messages: all at once, one line each, the nearest name."""

from __future__ import annotations

import re

import pytest

from fedloom.config import resolve
from fedloom.config.problems import KNOWN_ELSEWHERE
from fedloom.config.schema import every_setting
from fedloom.errors import SettingsError


def problems(*overrides: str, **document: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        resolve({"training": {"local_steps": 1}, **document}, "mine.toml", overrides)
    return str(caught.value).splitlines()


def test_every_problem_is_reported_at_once_one_line_each() -> None:
    found = problems(
        "method.name=flroa",
        "federation.rounds=3",
        "federation.clients_per_round=40",
        "model.base=/nowhere/at/all",
        methd={"x": 1},
    )
    named = [line.partition(":")[0] for line in found]
    assert sorted(named) == [
        "federation.clients_per_round",
        "federation.rounds",
        "methd",
        "method.name",
        "model.base",
    ]


def test_a_line_says_expected_received_where_and_what_to_do() -> None:
    (line,) = problems("training.batch_size=0")
    assert line == (
        "training.batch_size: expected an integer ≥ 1, got 0, in --set; "
        "give such a value, or drop the setting for its default"
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("training.batchsize", "training.batch_size"),
        ("training.lr", "training.learning_rate"),
        ("training.seed", "run.seed"),
        ("method.rank", "method.ranks"),
        ("federation.rounds", "federation.num_rounds"),
        ("data.alpha", "method.alpha"),
        ("method.lora_alpha", "method.alpha"),
        ("wire.dtpye", "wire.dtype"),
    ],
)
def test_the_nearest_setting_is_suggested(typed: str, meant: str) -> None:
    (line,) = problems(f"{typed}=1")
    assert line.endswith(f"did you mean {meant}?")


def test_the_nearest_table_and_the_nearest_choice_are_suggested() -> None:
    table, choice = sorted(problems("method.name=zeropadding", fedration={}))
    assert table.endswith("did you mean [federation]?")
    assert "did you mean zero-padding?" in choice


def test_words_of_other_tools_lead_to_settings_that_exist() -> None:
    assert set(KNOWN_ELSEWHERE.values()) <= {name for name, _ in every_setting()}


def test_a_list_without_brackets_is_written_out() -> None:
    (numbers,) = problems("method.ranks=8,4,4")
    (names,) = problems("run.trackers=wandb,mlflow")
    assert numbers.endswith("write a list: [8, 4, 4]")
    assert names.endswith('write a list: ["wandb", "mlflow"]')


def test_a_table_that_is_no_table_is_refused() -> None:
    (line,) = problems(run=3)
    assert line.startswith("run: expected a table [run], got 3, in mine.toml")


def test_a_setting_outside_any_table_is_led_home() -> None:
    (line,) = problems(seed=3)
    assert line.endswith("did you mean run.seed?")


def test_a_check_that_rests_on_a_bad_setting_waits_for_it() -> None:
    (line,) = problems("federation.num_clients=0", "method.ranks=[4, 4]")
    assert line.startswith("federation.num_clients: expected an integer ≥ 1")


def test_text_that_looks_like_a_format_is_shown_as_it_is() -> None:
    (line,) = problems("wire.dtype={x}\n%s")
    assert '"{x}\\n%s"' in line


@pytest.mark.parametrize(
    "override", ["training.learning_rate=inf", "partition.concentration=nan", "method.alpha=[inf]"]
)
def test_a_number_that_is_not_finite_is_refused(override: str) -> None:
    [problem] = problems(override)
    assert re.match(rf"{override.partition('=')[0]}: expected a finite number > 0.*, got \[?(Infinity|NaN)", problem)
