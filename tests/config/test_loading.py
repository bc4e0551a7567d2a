"""Recipes and overrides: reading, precedence, origins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.config import Settings, load
from fedloom.config.loading import parse_value
from fedloom.errors import SettingsError

MINIMAL = "[training]\nlocal_steps = 5\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(MINIMAL, encoding="utf-8")
    return file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


def test_an_override_wins_over_the_file_and_the_last_override_over_the_first(recipe: Path) -> None:
    settings = load(recipe, ["training.local_steps=7", "run.seed=2", "run.seed=3"])
    assert (settings.training.local_steps, settings.run.seed) == (7, 3)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load(tmp_path / "mine.toml").training.local_steps == 5


def test_an_override_of_one_alternative_replaces_the_other(recipe: Path) -> None:
    training = load(recipe, ["training.local_epochs=2"]).training
    assert (training.local_steps, training.local_epochs) == (None, 2.0)


def test_both_alternatives_in_one_place_are_refused(recipe: Path) -> None:
    (line,) = problems(recipe, "training.local_steps=3", "training.local_epochs=2")
    assert "exactly one of training.local_steps, training.local_epochs" in line
    assert "got local_steps = 3 and local_epochs = 2.0" in line


def test_an_override_to_another_method_sets_aside_what_only_the_files_method_can_use(recipe: Path) -> None:
    table = '[method]\nname = "flora"\nranks = [6, 2]\nbroadcast = "compressed"\n[federation]\nnum_clients = 2\n'
    recipe.write_text(MINIMAL + table, encoding="utf-8")
    settings = load(recipe, ["method.name=fedit"])
    assert (settings.method.ranks, settings.method.broadcast) == (4, "stack")
    assert load(recipe, ["method.name=flora"]).method.ranks == (6, 2)


def test_an_override_that_the_method_named_beside_it_cannot_use_is_refused(recipe: Path) -> None:
    recipe.write_text(MINIMAL + '[method]\nname = "flora"\n[federation]\nnum_clients = 2\n', encoding="utf-8")
    (line,) = problems(recipe, "method.name=fedit", "method.broadcast=compressed")
    assert line.startswith("method.broadcast: expected method.broadcast only with method.name = flora")
    (line,) = problems(recipe, "method.name=fedit", "method.ranks=[6, 2]")
    assert line.startswith("method.ranks: expected one rank for all clients")


def test_neither_alternative_is_refused(recipe: Path) -> None:
    (line,) = problems(recipe, "training.local_steps=")
    assert line.startswith("training.local_steps: expected exactly one of")


def test_nothing_after_the_equals_sign_is_the_default(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "[run]\nseed = 9\n", encoding="utf-8")
    assert load(recipe, ["run.seed="]).run.seed == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("true", True),
        ('"a b"', "a b"),
        ("flora", "flora"),
        ("[8, 4]", [8, 4]),
        ("/data/x.json", "/data/x.json"),
        ("2024-01-01", "2024-01-01"),
        ("1\nother = 2", "1\nother = 2"),
        ("", None),
    ],
)
def test_values_are_toml_or_bare_text(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("override", ["seed=1", "run.seed", "run.seed.x=1", "=3", ""])
def test_an_override_needs_table_setting_and_value(recipe: Path, override: str) -> None:
    (line,) = problems(recipe, override)
    assert line.startswith(f"--set {override}: expected table.setting=value")


def test_a_setting_without_its_table_is_led_home(recipe: Path) -> None:
    for override, meant in (("learning_rate=1e-3", "training.learning_rate"), ("lr=1", "training.learning_rate")):
        (line,) = problems(recipe, override)
        assert line.endswith(f"did you mean {meant}?")


def test_what_is_given_nowhere_has_no_place_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[run]\nseed = 1\n")
    (line,) = problems(tmp_path / "mine.toml")
    assert line.startswith("training.local_steps: expected exactly one of")
    assert "got none; set one" in line


def test_where_a_value_came_from_stands_in_the_message(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "[run]\nseed = -1\n", encoding="utf-8")
    of_override, of_file = problems(recipe, "wire.dtype=fp64")
    assert f"in {recipe};" in of_file
    assert "in --set;" in of_override


def test_a_resolved_config_loads_as_the_same_settings(recipe: Path, tmp_path: Path) -> None:
    settings = load(recipe, ["federation.num_clients=2", "method.name=flora", "method.ranks=[4, 2]"])
    resolved = tmp_path / "config.json"
    resolved.write_text(json.dumps(settings.as_dict()), encoding="utf-8")
    assert load(resolved) == settings


def test_an_empty_table_is_the_defaults(recipe: Path) -> None:
    recipe.write_text(MINIMAL + "[run]\n", encoding="utf-8")
    assert load(recipe).run == Settings().run


@pytest.mark.parametrize("content", [b"[training\n", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    (line,) = problems(file)
    assert line.startswith(f"{file}: expected ")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    (line,) = problems(tmp_path / "none.toml")
    assert "No such file" in line


def test_the_file_is_left_as_it_was(recipe: Path) -> None:
    load(recipe, ["training.local_epochs=2"])
    assert recipe.read_text(encoding="utf-8") == MINIMAL
