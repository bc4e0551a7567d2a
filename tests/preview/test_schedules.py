"""Schedules of as many rows as a recipe: what is proposed, what it sends, and that its options choose it."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom import config
from fedloom.config import Settings
from fedloom.preview.description import describe


def recipe(**tables: dict[str, Any]) -> Settings:
    document: dict[str, Any] = {
        "method": {"name": "fedit", "ranks": 32, "alpha": 64},
        "federation": {"num_clients": 10, "num_rounds": 6},
        "training": {"local_steps": 5, "batch_size": 4},
    }
    for table, values in tables.items():
        document[table] = {**document.get(table, {}), **values}
    return config.resolve(document, "a test")


def test_every_schedule_is_of_the_recipes_rows_and_few_bits_are_few_bytes() -> None:
    as_set, *others = describe(recipe()).schedules
    assert (as_set.num_rows, as_set.num_rounds, as_set.clients_per_round) == (1200, 6, 10)
    assert {one.num_rows for one in others} == {1200}
    assert [(one.num_rounds, one.clients_per_round, one.local_steps, one.batch_size) for one in others] == [
        (20, 3, 5, 4),
        (80, 3, 5, 1),
        (100, 3, 1, 4),
        (300, 1, 1, 4),
    ]
    # Five times the rounds of few clients in an eighth of the bits.
    few, _, synchronised, one_client = others
    assert synchronised.upload_bytes == one_client.upload_bytes < 0.9 * few.upload_bytes


def test_the_options_of_a_schedule_choose_it() -> None:
    for one in describe(recipe()).schedules:
        chosen = [f"{name}={value}" for name, value in one.settings.items()]
        document = recipe().as_dict()
        given = {table: {name: document[table][name] for name in names} for table, names in GIVEN.items()}
        settings = config.resolve(given, "a test", chosen)
        assert describe(settings).schedules[0] == one.__class__(
            **{**one.__dict__, "title": "as set", "settings": {}},
        )


GIVEN = {
    "method": ("name", "ranks", "alpha"),
    "federation": ("num_clients", "num_rounds"),
    "training": ("local_steps", "batch_size"),
}


def test_a_recipe_of_epochs_has_schedules_once_the_rows_are_told() -> None:
    settings = config.resolve({"method": {"name": "fedit", "ranks": 4}, "training": {"local_epochs": 1}}, "a test")
    assert describe(settings).schedules == ()
    assert [one.title for one in describe(settings, num_rows=900).schedules] == [
        "few clients a round",
        "short rounds",
        "synchronised steps",
        "one client a step",
    ]


@pytest.mark.parametrize("method", ["centralised", "standalone", "base", "splitlora"])
def test_what_is_not_federated_has_none(method: str) -> None:
    settings = config.with_method(recipe(data={"path": "embedded"}), method)
    assert describe(settings).schedules == ()


def test_a_schedule_that_the_recipe_does_not_allow_is_left_out() -> None:
    # Eight of ten must answer, so three are too few to draw.
    assert [one.title for one in describe(recipe(federation={"min_clients": 8})).schedules] == ["as set"]
