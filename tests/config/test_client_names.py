"""Settings per client by name: as many as clients, resolved in the partition's order, wrong names refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedloom.config import resolve
from fedloom.config.client_names import resolve_names
from fedloom.config.schema import PER_CLIENT, Settings
from fedloom.config.variants import with_method
from fedloom.errors import SettingsError

NAMES = ("2", "10", "north")
VALUES = {"north": 1, "10": 2, "2": 3}


def settings_with(name: str, value: object, **tables: Any) -> Settings:
    table, _, key = name.partition(".")
    return Settings.model_validate({table: {key: value}, **tables})


@pytest.mark.parametrize("name", PER_CLIENT)
def test_every_setting_per_client_may_name_the_clients(name: str) -> None:
    settings = settings_with(name, VALUES)
    assert settings.federation.num_clients == 3
    assert resolve_names(settings, NAMES).value(name) == (3, 2, 1)
    assert resolve_names(settings, NAMES[::-1]).value(name) == (1, 2, 3)
    assert settings.value(name) == VALUES


@pytest.mark.parametrize("name", PER_CLIENT)
def test_before_rows_are_read_named_values_stand_in_order_of_the_names(name: str) -> None:
    settings = settings_with(name, VALUES)
    assert settings.per_client(settings.value(name)) == (3, 2, 1)


def test_what_is_given_by_position_stays_as_it_is() -> None:
    settings = Settings.model_validate({"method": {"ranks": (4, 2, 1), "alpha": 8.0}})
    assert resolve_names(settings, NAMES) == settings


def test_an_unknown_name_is_refused_with_the_nearest_client_and_a_missing_one_is_listed() -> None:
    named = {"north": 1, "sout": 2}
    settings = Settings.model_validate({"method": {"ranks": named, "alpha": {"north": 1.0, "west": 2.0}}})
    with pytest.raises(SettingsError) as caught:
        resolve_names(settings, ["north", "south"])
    lines = str(caught.value).splitlines()
    assert lines == [
        'method.ranks: expected a value for each client (north, south), got one for "sout", which is not a client; '
        "did you mean south?",
        'method.alpha: expected a value for each client (north, south), got one for "west", which is not a client; '
        "remove it or correct its name",
    ]
    with pytest.raises(SettingsError, match="got none for east, west; add what is missing"):
        resolve_names(Settings.model_validate({"method": {"ranks": {"north": 1}}}), ["east", "north", "west"])


def test_as_many_names_as_clients_are_needed() -> None:
    document = {"method": {"name": "flora", "ranks": {"a": 1, "b": 2}}, "training": {"local_steps": 1}}
    assert resolve(document, "recipe").federation.num_clients == 2
    with pytest.raises(SettingsError, match=r"one value, or 3 \(one per client\), got 2 names"):
        resolve(document, "recipe", ["federation.num_clients=3"])
    with pytest.raises(SettingsError, match=r"split.cut_layer: .* got 1 names"):
        resolve(document, "recipe", ["method.name=splitlora", "split.cut_layer={a=1}", "split.aggregation=flora"])


def test_names_can_be_set_on_the_command_line_and_a_run_s_config_reads_back() -> None:
    document = {"method": {"name": "splitlora"}, "training": {"local_steps": 1}, "split": {"aggregation": "flora"}}
    settings = resolve(
        document, "recipe", ["method.ranks={north=16,south=8}", "devices.latency_ms={north=1,south=2.5}"]
    )
    assert settings.method.ranks == {"north": 16, "south": 8}
    assert settings.client_scales == (2.0, 2.0)
    assert resolve(settings.as_dict(), "config.json") == settings


def test_a_bad_value_of_a_name_is_one_line() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({"method": {"ranks": {"a": 0, "b": "x"}}, "training": {"local_steps": 1}}, "recipe")
    [line] = str(caught.value).splitlines()
    assert "an integer ≥ 1, or a list (each an integer ≥ 1), or a table of name = an integer ≥ 1" in line


def test_a_method_of_one_rank_takes_the_mean_of_the_named_ones() -> None:
    settings = Settings.model_validate({"method": {"name": "flora", "ranks": {"a": 4, "b": 2}}})
    assert with_method(settings, "fedit").method.ranks == 3


def test_the_largest_named_rank_must_fit_the_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "num_attention_heads": 2}')
    (tmp_path / "tokenizer.json").write_text("{}")
    tables = {"model": {"base": str(tmp_path)}, "method": {"name": "flora", "ranks": {"a": 4, "b": 9}}}
    with pytest.raises(SettingsError, match="ranks of at most 8"):
        resolve({**tables, "training": {"local_steps": 1}}, "recipe")
