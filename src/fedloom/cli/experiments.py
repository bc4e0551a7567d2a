"""validate, describe, run, compare: a recipe in, an experiment out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom import config, recipes
from fedloom.cli.options import (
    DEFAULT_RECIPE,
    ComparisonOption,
    FreshOption,
    GridOption,
    JsonOption,
    OutOption,
    OwnSetOption,
    RecipeArgument,
    ReferenceOption,
    SetOption,
)
from fedloom.cli.output import print_json, print_line, print_result, say, say_folder
from fedloom.config import Settings
from fedloom.config.compared_variants import check_methods, check_seeds, refuse_ignored
from fedloom.config.method_settings import split_overrides
from fedloom.config.setting import values_of
from fedloom.errors import SettingsError
from fedloom.methods import table
from fedloom.wording import counted_rounds

RUNS = Path("runs")
STANDARD_ROUNDS = [name for name in table.shipped("runs_rounds") if table.traits_of(name).is_standard]


def load_settings(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] | None = None) -> Settings:
    """Load a shipped recipe by name, a file, or tables as a dict; ``overrides`` are ``TABLE.SETTING=VALUE``.

    Raises:
        SettingsError: a line per problem.
    """
    given = (overrides,) if isinstance(overrides, str) else overrides or ()
    if isinstance(recipe, Mapping):
        return config.resolve(dict(recipe), "the settings", given)
    if is_file(recipe):
        return config.load(recipe, given)
    document = config.parse(recipes.read(str(recipe)), f"{recipe}.toml")
    return config.resolve(document, f"recipe {recipe}", given)


def is_file(recipe: str | Path) -> bool:
    """Tell a file from the name of a shipped recipe."""
    path = Path(recipe)
    if str(recipe) in recipes.names():
        return False
    return path.suffix in (".toml", ".json") or path.exists() or len(path.parts) > 1


def default_folder(recipe: str) -> Path:
    """Return the default folder of a recipe's run."""
    return RUNS / Path(recipe).stem if is_file(recipe) else RUNS / recipe


def validate(
    recipe: RecipeArgument = DEFAULT_RECIPE,
    overrides: SetOption = None,
    data: Annotated[
        bool, typer.Option("--data", help="Read the rows too, and say all that a run would refuse of them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Report every problem of a recipe at once, without loading a model.

    With --data all rows are read, made into tokens and dealt to the clients; nothing is fetched or written.
    """
    found: tuple[str, ...] = ()
    try:
        settings = load_settings(recipe, overrides)
        if data:
            found = _rows_found(settings, default_folder(recipe))
    except SettingsError as error:
        if as_json:
            print_json({"recipe": recipe, "valid": False, "problems": str(error).splitlines()})
        raise
    if as_json:
        rows = {"found": list(found)} if data else {}
        print_json({"recipe": recipe, "valid": True, "problems": [], **rows, "settings": settings.as_dict()})
    else:
        for line in (f"{recipe} is valid: {summary(settings)}", *found):
            print_line(line)


def _rows_found(settings: Settings, folder: Path) -> tuple[str, ...]:
    """Return what the rows hold; what could not be looked at is noted.

    Raises:
        SettingsError: a line per problem.
    """
    from fedloom.preview.row_check import check_rows

    checked = check_rows(settings, folder)
    for line in checked.unknown:
        say(f"note: not looked at: {line}")
    if checked.problems:
        raise SettingsError("\n".join(checked.problems))
    return checked.found


def summary(settings: Settings) -> str:
    """Return one line about what would run."""
    ranks = settings.method.ranks
    written = f"rank {ranks}" if isinstance(ranks, int) else f"ranks {', '.join(map(str, values_of(ranks)))}"
    clients = f"{settings.cohort_size} of {settings.federation.num_clients} clients a round"
    rounds = counted_rounds(settings.federation.num_rounds, settings.start_rounds)
    return (
        f"{settings.method.name}, {written}, {clients}, {rounds}, base {settings.model.base}, data {settings.data.path}"
    )


def describe(
    recipe: RecipeArgument = DEFAULT_RECIPE,
    overrides: SetOption = None,
    num_rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            metavar="N",
            min=1,
            help="Rows to train on in the whole run: shows schedules of as many. Default: what training.local_steps "
            "comes to.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show settings, trainable parameters, bytes per round and client, memory, and other schedules; train nothing."""
    settings = load_settings(recipe, overrides)
    from fedloom import experiment

    print_result(experiment.describe(settings, num_rows=num_rows), as_json=as_json)


def run(
    recipe: RecipeArgument = DEFAULT_RECIPE,
    overrides: SetOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train. The same command again resumes an interrupted run."""
    settings = load_settings(recipe, overrides)
    folder = out or default_folder(recipe)
    from fedloom import experiment
    from fedloom.reporting.progress import progress_for

    with progress_for() as progress:
        result = experiment.run(settings, folder, fresh=fresh, progress=progress)
    print_result(result, as_json=as_json)
    say_folder("run", folder)


def compare(
    recipe: RecipeArgument = DEFAULT_RECIPE,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="A,B,...",
            help="Methods, separated by commas: " + ", ".join(table.shipped()) + ", or an installed one of your own.",
        ),
    ] = ",".join(STANDARD_ROUNDS),
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="1,2,...", help="Seeds, separated by commas. Default: run.seed.", show_default=False
        ),
    ] = None,
    reference: ReferenceOption = None,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            metavar="N",
            help="Runs at once, each in a process of its own on this machine; fewer where memory holds no more.",
        ),
    ] = 1,
    overrides: OwnSetOption = None,
    grid: GridOption = None,
    tune_seed: Annotated[
        int | None,
        typer.Option(
            "--tune-seed",
            metavar="N",
            help="Seed of the tuning runs. Default: the first of the seeds.",
            min=0,
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            metavar="FRACTION",
            help="Share of the training rows that --grid chooses on. Default: 0.1.",
            show_default=False,
        ),
    ] = None,
    out: ComparisonOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run several methods over several seeds on the same data at the same budget, and print one table.

    With --grid each method's settings are chosen first, on rows that no run is scored on.
    """
    common, own = split_overrides(overrides or ())
    settings = load_settings(recipe, common)
    chosen = parse_methods(methods)
    numbers = [settings.run.seed] if seeds is None else parse_seeds(seeds)
    grids = config.compared_variants(settings, chosen, numbers, own, grid or ())
    refuse_ignored(settings, grids, numbers, common, grid or ())
    alone = default_folder(recipe)
    folder = out or alone.with_name(f"{alone.name}-compared")
    from fedloom import experiment
    from fedloom.reporting.progress import progress_for

    with progress_for() as progress:
        result = experiment.compare(
            settings,
            chosen,
            numbers,
            folder,
            overrides=own,
            grid=grid or (),
            tune_seed=tune_seed,
            validation=validation,
            reference=reference,
            fresh=fresh,
            progress=progress,
            parallel=parallel,
        )
    print_result(result, as_json=as_json)
    say_folder("comparison", folder)


def parse_methods(text: str) -> list[str]:
    """Read a list of methods.

    Raises:
        SettingsError: one of them does not exist, is named twice, or there is none.
    """
    names = [name.strip() for name in text.split(",")]
    try:
        check_methods(names)
    except SettingsError as error:
        raise SettingsError(f"--{error}") from None
    return names


def parse_seeds(text: str) -> list[int]:
    """Read a list of seeds.

    Raises:
        SettingsError: one of them is not an integer ≥ 0, or is named twice.
    """
    try:
        seeds = [int(seed) for seed in text.split(",")]
        check_seeds(seeds)
    except ValueError:
        raise SettingsError(f"--seeds: expected integers ≥ 0, got {text!r}; write them as in --seeds 1,2,3") from None
    except SettingsError as error:
        raise SettingsError(f"--{error}") from None
    return seeds
