"""recipes: list the shipped experiments with their expected figures; copy one to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom import recipes
from fedloom.cli.options import JsonOption
from fedloom.cli.output import print_json, print_line, say
from fedloom.wording import typed

app = typer.Typer(invoke_without_command=True)


@app.callback()
def list_recipes(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the shipped experiments with their expected figures, or copy one to edit."""
    if context.invoked_subcommand is not None:
        return
    found = [recipes.describe(name) for name in recipes.names()]
    if as_json:
        print_json([recipe.as_dict() for recipe in found])
        return
    for recipe in found:
        print_line(recipe.name)
        for label, text in (
            ("claims", recipe.claim),
            ("expect", recipe.expect),
            ("run", recipe.command),
            ("small", recipe.small),
            ("prints", recipe.prints),
        ):
            print_line(f"  {label:<7} {text}")


@app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.", show_default=False)],
    to: Annotated[
        Path,
        typer.Option("--to", metavar="FILE", help="New file, or a folder to put it in.", show_default="this folder"),
    ] = Path(),
) -> None:
    """Copy a shipped recipe to a new file, to edit."""
    file = recipes.copy(name, to)
    print_line(str(file))
    say(f"edit it, then: {typed('fedloom', 'validate', file)}")
