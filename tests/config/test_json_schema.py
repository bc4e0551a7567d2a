"""The schema that other programs read says what ours does."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from fedloom import config, recipes
from fedloom.cli.app import exit_code
from fedloom.config.json_schema import json_schema
from fedloom.methods import table


def declared(name: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    schema, (part, _, key) = schema or json_schema(), name.partition(".")
    kind = schema["properties"][part]["$ref"].rpartition("/")[2]
    found: dict[str, Any] = schema["$defs"][kind]["properties"][key]
    return found


def test_every_setting_is_in_the_schema_with_its_sentence() -> None:
    schema = json_schema()
    for name, field in config.every_setting():
        assert declared(name, schema)["description"] == field.description


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_is_valid_by_the_schema(name: str) -> None:
    document = json.loads(json.dumps(config.parse(recipes.read(name), name), default=str))
    jsonschema.Draft202012Validator(json_schema()).validate(document)


@pytest.mark.parametrize(
    "document",
    [
        {"method": {"name": "fedid"}},
        {"model": {"bse": "x"}},
        {"training": {"local_steps": 0}},
        {"run": {"keep_states": "some"}},
        {"modle": {}},
    ],
)
def test_what_is_invalid_by_itself_is_invalid_by_the_schema(document: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not validator.is_valid({"method": {"name": "fedit"}} | document)
    assert validator.is_valid({"method": {"name": "fedit"}})


def test_when_a_setting_acts_is_said_by_the_methods_names() -> None:
    assert declared("method.name")["enum"] == list(table.names())
    assert "splitlora" not in declared("model.adapter")["when"]["method.name"]
    assert "when" not in declared("model.base")


def test_the_command_prints_the_schema_and_lists_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["settings", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert exit_code(["settings", "run"]) == 0
    names = [line.split("`")[1] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for name, _ in config.every_setting() if name.startswith("run.")]
    assert exit_code(["settings", "run.sed"]) == 2
    assert "try run.seed" in capsys.readouterr().err
