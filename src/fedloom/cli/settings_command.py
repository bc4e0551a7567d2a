"""settings: every setting with its type, default and sentence, or the JSON Schema of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloom import config
from fedloom.cli.output import print_json, print_line
from fedloom.config.json_schema import json_schema
from fedloom.config.setting import described
from fedloom.errors import SettingsError
from fedloom.wording import nearest


def settings(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A table, or one setting: `model`, `model.base`.", show_default=False),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe instead.")] = False,
) -> None:
    """List the settings of a recipe: what each takes, its default, and what it does.

    With --schema print them as JSON Schema, by which editors complete and check a recipe.
    """
    if schema:
        if name is not None:
            raise SettingsError(f"--schema: expected no name, got {name!r}: the schema is of all settings; drop one")
        print_json(json_schema())
        return
    every = dict(config.every_setting())
    chosen = [one for one in every if name is None or one == name or one.startswith(f"{name}.")]
    if not chosen:
        known = [*every, *config.tables()]
        close = nearest(str(name), known)
        advice = f"try {close}" if close else "run fedloom settings for all"
        raise SettingsError(f"expected a table or a setting, got {name!r}; {advice}")
    for one in chosen:
        print_line(described(one, every[one]))
