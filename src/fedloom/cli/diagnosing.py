"""doctor: what this machine has, and whether a recipe would run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedloom import config, recipes
from fedloom.cli.experiments import default_folder, is_file
from fedloom.cli.options import FreshOption, JsonOption, OutOption, SetOption
from fedloom.cli.output import print_json, print_result
from fedloom.config import Settings, checks

NOT_HERE = 2


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A shipped recipe or a TOML file to look at.", show_default=False),
    ] = None,
    overrides: SetOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    load: Annotated[bool, typer.Option("--load", help="Load the base too, and run it on some of the rows.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show what this machine has, and whether a recipe would run here; if not, why.

    All rows are read and made into tokens; nothing is fetched or written, and no weight is loaded without `--load`. The
    exit code is 2 if the recipe would not run.
    """
    from fedloom.assembly.inputs import Workshop
    from fedloom.preview.diagnosis import diagnose
    from fedloom.preview.rehearsal import SketchWorkshop
    from fedloom.reporting.progress import progress_for

    if recipe is None:
        diagnosis = diagnose()
    else:
        settings, origins = _settings_without_files(recipe, overrides or ())
        folder = out or default_folder(recipe)
        with progress_for() as progress:
            workshop = Workshop(progress) if load else SketchWorkshop(progress)
            diagnosis = diagnose(recipe, settings, origins=origins, out=folder, fresh=fresh, workshop=workshop)
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        print_result(diagnosis, as_json=False)
    return 0 if diagnosis.would_run else NOT_HERE


def _settings_without_files(recipe: str, overrides: Sequence[str]) -> tuple[Settings, dict[str, str]]:
    """Load a recipe without checking that its files exist: the doctor checks them itself.

    Return where each setting was read too.

    Raises:
        SettingsError: a line per problem.
    """
    if is_file(recipe):
        document, source = config.read(Path(recipe)), recipe
    else:
        document, source = config.parse(recipes.read(recipe), f"{recipe}.toml"), f"recipe {recipe}"
    settings = config.resolve(document, source, overrides, also=(checks.problems,))
    return settings, config.merge(document, source, overrides)[1]
