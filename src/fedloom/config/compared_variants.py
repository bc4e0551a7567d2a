"""One recipe as several methods over several seeds, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.config.grid import MethodGrid, method_grids, parse_grid, refuse_contradiction
from fedloom.config.loading import check, parse_overrides
from fedloom.config.method_settings import CHOSEN, own_settings
from fedloom.config.schema import Settings
from fedloom.config.variants import with_seed
from fedloom.errors import SettingsError
from fedloom.methods import table

DERIVED = ("method.ranks", "method.alpha")
"""Settings that a method of one rank takes the mean of."""


def compared_variants(
    settings: Settings,
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    grid: Sequence[str] = (),
) -> list[MethodGrid]:
    """Return what every method of a comparison is run with: one experiment, or those of a grid to choose from.

    ``overrides`` are settings of one method (``METHOD:table.setting=value``), ``grid`` values to try for one or for all
    (``[METHOD:]table.setting=value,value,...``).

    Raises:
        SettingsError: a method or seed does not exist or comes twice, there is none, or a variant is not valid.
    """
    check_methods(methods)
    check_seeds(seeds)
    own = own_settings(overrides, methods)
    grids = method_grids(settings, methods, own, parse_grid(grid, methods))
    for seed in seeds:
        check(with_seed(grids[0].points[0].settings, seed))
    return grids


def refuse_ignored(
    settings: Settings, grids: Sequence[MethodGrid], seeds: Sequence[int], overrides: Sequence[str], grid: Sequence[str]
) -> None:
    """Check that every override for all methods of a comparison acts in some of its variants.

    Raises:
        SettingsError: one of them was given for nothing.
    """
    methods = [one.method for one in grids]
    refuse_contradiction(parse_overrides(overrides), parse_grid(grid, methods))
    variants = [with_seed(point.settings, seed) for one in grids for point in one.points for seed in seeds]
    for override in overrides:
        name, _, value = (part.strip() for part in override.partition("="))
        if not value or name in DERIVED or any(one.value(name) == settings.value(name) for one in variants):
            continue
        chooser = CHOSEN.get(name, f"it acts with none of {', '.join(methods)}")
        raise SettingsError(f"--set {override}: expected a setting that this comparison uses; {chooser}; drop it")


def check_methods(methods: Sequence[str]) -> None:
    """Check the methods of a comparison.

    Raises:
        SettingsError: one of them does not exist or comes twice, or there is none.
    """
    if isinstance(methods, str):
        raise SettingsError(f"methods: expected a list of names, got the text {methods!r}; give [{methods!r}]")
    for name in methods or ("",):
        if not table.has(name):
            known = table.names()
            advice = table.remedy(name, known)
            raise SettingsError(f"methods: expected names from {', '.join(known)}, got {name!r}; {advice}")
    _check_distinct("methods", methods)


def check_seeds(seeds: Sequence[int]) -> None:
    """Check the seeds of a comparison.

    Raises:
        SettingsError: one of them is not an integer ≥ 0 or comes twice, or there is none.
    """
    if not seeds or isinstance(seeds, str) or any(not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise SettingsError(f"seeds: expected integers ≥ 0, got {seeds!r}; give some, e.g. 1, 2, 3")
    _check_distinct("seeds", seeds)


def _check_distinct(what: str, items: Sequence[object]) -> None:
    for item in items:
        if items.count(item) > 1:
            raise SettingsError(f"{what}: expected each value once, got {item} twice; remove one")
