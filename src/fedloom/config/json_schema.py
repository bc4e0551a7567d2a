"""The settings as JSON Schema, for editors and other programs."""

from __future__ import annotations

from typing import Any

from fedloom.config.schema import Settings, every_setting
from fedloom.config.setting import choices, conditions


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe: types, bounds, defaults, sentences.

    ``when`` of a setting lists the values of other settings under which it acts. What settings demand of each other,
    and of files, is checked by ``fedloom validate`` alone.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}
    schema |= {"title": "fedloom recipe", "description": "The settings of an experiment."}
    for name, field in every_setting():
        table, _, key = name.partition(".")
        kind = schema["properties"][table].get("$ref", "").rpartition("/")[2]
        declared = schema["$defs"][kind]["properties"][key]
        declared.pop("title", None)
        acts = {other: list(values) for other, values in conditions(field).items()}
        declared.pop("when", None)
        if acts:
            declared["when"] = acts
        if declared.get("type") == "string" and (known := choices(field)):
            declared["enum"] = known
    return schema
