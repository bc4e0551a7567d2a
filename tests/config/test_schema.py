"""The schema: what it accepts, and what it derives per client."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from fedloom.config import Settings, every_setting
from fedloom.config.setting import expected

RELIED_ON = """
model.base data.path data.shape partition.scheme method.name method.ranks federation.num_rounds federation.num_clients
federation.clients_per_round training.local_steps training.local_epochs training.batch_size run.seed run.keep_updates
wire.dtype
"""


def made(**tables: object) -> Settings:
    return Settings.model_validate(tables)


def test_names_that_others_rely_on_are_there() -> None:
    assert set(RELIED_ON.split()) <= {name for name, _ in every_setting()}


def test_every_setting_has_a_sentence_and_says_what_it_accepts() -> None:
    for name, field in every_setting():
        assert (field.description or "").endswith("."), name
        assert expected(field), name


def test_every_default_is_accepted_when_written_out() -> None:
    for name, field in every_setting():
        table, _, key = name.partition(".")
        made(**{table: {key: field.get_default()}})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().run.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize("value", ["3", 3.0, True, 0, -1])
def test_counts_are_integers_from_one(value: object) -> None:
    with pytest.raises(ValidationError):
        made(federation={"num_rounds": value})


def test_whole_numbers_are_accepted_where_a_number_is_expected() -> None:
    assert made(server={"learning_rate": 2}).server.learning_rate == 2.0


def test_one_rank_is_spread_over_all_clients() -> None:
    assert made(federation={"num_clients": 3}, method={"ranks": 4}).client_ranks == (4, 4, 4)


def test_alpha_is_twice_the_rank_when_left_out() -> None:
    assert made(federation={"num_clients": 2}, method={"ranks": (4, 16)}).client_scales == (2.0, 2.0)


def test_rslora_divides_alpha_by_the_root_of_the_rank() -> None:
    settings = made(federation={"num_clients": 2}, method={"ranks": (4, 16), "alpha": 8, "scaling": "rslora"})
    assert settings.client_scales == (4.0, 2.0)


@pytest.mark.parametrize(
    ("drawn", "cohort"),
    [(None, 10), (1, 1), (1.0, 10), (0.05, 1), (0.3, 3), (0.29, 2), (7, 7)],
    ids=str,
)
def test_clients_per_round_is_a_number_or_a_fraction_of_at_least_one(drawn: float | None, cohort: int) -> None:
    assert made(federation={"num_clients": 10, "clients_per_round": drawn}).cohort_size == cohort


def test_five_percent_of_ten_clients_is_one() -> None:
    assert made(federation={"num_clients": 10, "clients_per_round": 0.05}).cohort_size == 1


def test_a_fraction_that_floating_point_makes_too_small_is_not_rounded_down() -> None:
    assert math.floor(0.29 * 100) == 28
    assert made(federation={"num_clients": 100, "clients_per_round": 0.29}).cohort_size == 29


def test_plain_values_survive_json() -> None:
    settings = made(federation={"num_clients": 2}, method={"ranks": (4, 2)})
    assert json.loads(json.dumps(settings.as_dict())) == settings.as_dict()
