"""What a comparison tries for each method before it runs it: ``--grid [METHOD:]table.setting=value,value,...``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.config.loading import OVERRIDE, check, parse_value, replaced
from fedloom.config.method_settings import (
    check_compared,
    of_method,
    origins_of,
    refuse_shared,
    rivals,
    scope_of,
    told_of,
)
from fedloom.config.schema import Settings, every_setting
from fedloom.config.setting import shown
from fedloom.config.variants import with_method
from fedloom.errors import SettingsError
from fedloom.wording import either

OPTION = "--grid"
MOST_POINTS = 1000


@dataclass(frozen=True)
class GridKey:
    """One setting and the values to try, for one method or for all; ``given`` is how it was written."""

    given: str
    method: str | None
    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class GridPoint:
    """One choice of values by full name, and the experiment with it."""

    values: Mapping[str, Any]
    settings: Settings


@dataclass(frozen=True)
class MethodGrid:
    """What is tried for a method, in the order of the grid; one point where nothing is.

    ``skipped`` gives by setting the reason why a grid of all methods does not count for this one.
    """

    method: str
    points: tuple[GridPoint, ...]
    skipped: Mapping[str, str]

    @property
    def is_tuned(self) -> bool:
        """Whether there is a choice."""
        return len(self.points) > 1


def parse_grid(grid: Sequence[str], methods: Sequence[str]) -> list[GridKey]:
    """Read a grid.

    Raises:
        SettingsError: a part has another form, no value, a value twice, a method that is not compared, or a setting
            that another part has or that must be the same for all.
    """
    keys: list[GridKey] = []
    for given in grid:
        method, rest = scope_of(given)
        match = OVERRIDE.fullmatch(rest)
        if match is None:
            raise SettingsError(
                f"{OPTION} {given}: expected [METHOD:]table.setting=value,value,..., got {given!r}; write e.g. "
                "training.learning_rate=1e-3,2e-3"
            )
        if method is not None:
            check_compared(OPTION, given, method, methods)
        name = f"{match[1]}.{match[2]}"
        refuse_shared(OPTION, given, name)
        earlier = rivals(name, [key.name for key in keys if key.method == method])
        if earlier:
            raise SettingsError(
                f"{OPTION} {given}: expected one grid of {either(dict.fromkeys((*earlier, name)))}, got two; drop one"
            )
        keys.append(GridKey(given, method, name, _values(given, match[3])))
    return keys


def _values(given: str, text: str) -> tuple[Any, ...]:
    """Read values between commas: as one TOML list, or one by one where they are bare text."""
    listed = parse_value(f"[{text}]")
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise SettingsError(
            f"{OPTION} {given}: expected values separated by commas, got an empty one; give each a value"
        )
    values = listed if isinstance(listed, list) else [parse_value(part) for part in parts]
    for value in values:
        if list(map(shown, values)).count(shown(value)) > 1:
            raise SettingsError(f"{OPTION} {given}: expected each value once, got {shown(value)} twice; remove one")
    return tuple(values)


def method_grids(
    settings: Settings, methods: Sequence[str], own: Mapping[str, Mapping[str, Any]], keys: Sequence[GridKey]
) -> list[MethodGrid]:
    """Return what is tried for each method, every point of it checked.

    Of two values for one setting the method's own wins: ``METHOD:`` before a grid over the grid of all methods, a
    setting of its own over that too. A setting of the common grid that does not act with a method is skipped there.

    Raises:
        SettingsError: a point is not valid, or a part of the grid acts nowhere.
    """
    grids = [_grid_of(settings, method, own.get(method, {}), keys) for method in methods]
    for key in keys:
        if key.method is None and all(key.name in grid.skipped for grid in grids):
            reasons = "; ".join(dict.fromkeys(f"{grid.method}: {grid.skipped[key.name]}" for grid in grids))
            raise SettingsError(
                f"{OPTION} {key.given}: expected a setting to choose for one of the methods, got one for none "
                f"({reasons}); drop it"
            )
    return grids


def refuse_contradiction(overrides: Mapping[str, Any], keys: Sequence[GridKey]) -> None:
    """Check that nothing is both set for all methods and tried for all.

    Raises:
        SettingsError: something is.
    """
    for key in keys:
        if key.method is None and (both := rivals(key.name, overrides)):
            raise SettingsError(
                f"{OPTION} {key.given}: expected no --set {both[0]} besides, got both; drop one, or set it for one "
                f"method: --set METHOD:{both[0]}=..."
            )


def _grid_of(settings: Settings, method: str, own: Mapping[str, Any], keys: Sequence[GridKey]) -> MethodGrid:
    mine = [key for key in keys if key.method == method]
    for key in mine:
        if both := rivals(key.name, own):
            raise SettingsError(f"--grid {key.given}: expected no --set {method}:{both[0]} besides, got both; drop one")
    skipped = {}
    for key in (key for key in keys if key.method is None):
        if rivals(key.name, [one.name for one in mine]):
            skipped[key.name] = "it has a grid of its own"
        elif rivals(key.name, own):
            skipped[key.name] = "it has a value of its own"
        else:
            mine.append(key)
    while True:
        points = _points(settings, method, own, mine)
        idle = [key for key in mine if not _acts(key, points)]
        if not idle:
            return MethodGrid(method, _distinct(points), skipped)
        for key in idle:
            if key.method is not None:
                raise SettingsError(
                    f"{OPTION} {key.given}: expected a setting that acts with {method}, got {key.name}; drop it"
                )
            skipped[key.name] = "it does not act"
        mine = [key for key in mine if key not in idle]


@dataclass(frozen=True)
class _Tried:
    """A combination of values as it was asked for, and as the method takes it."""

    combination: Mapping[str, Any]
    kept: Mapping[str, bool]
    settings: Settings


def _points(settings: Settings, method: str, own: Mapping[str, Any], keys: Sequence[GridKey]) -> list[_Tried]:
    if not keys:
        return [_Tried({}, {}, of_method(settings, method, own))]
    order = [name for name, _ in every_setting()]
    ordered = sorted(keys, key=lambda key: order.index(key.name) if key.name in order else len(order))
    names = [key.name for key in ordered]
    combinations = list(itertools.product(*(key.values for key in ordered)))
    if len(combinations) > MOST_POINTS:
        raise SettingsError(
            f"{OPTION}: expected at most {MOST_POINTS:,} points for {method}, got {len(combinations):,}; narrow it"
        )
    start = with_method(settings, method)
    return [_tried(start, method, own, dict(zip(names, one, strict=True))) for one in combinations]


def _tried(start: Settings, method: str, own: Mapping[str, Any], combination: Mapping[str, Any]) -> _Tried:
    origins = origins_of(method, own) | dict.fromkeys(combination, OPTION)
    try:
        asked = replaced(start, {**own, **combination}, origins)
        taken = with_method(asked, method, keep=own)
        check(taken, origins=origins)
    except SettingsError as error:
        raise told_of(method, error) from None
    kept = {name: taken.value(name) == asked.value(name) for name in combination}
    return _Tried(combination, kept, taken)


def _acts(key: GridKey, points: Sequence[_Tried]) -> bool:
    """Tell whether the method takes every value of a setting, each at some point of the others."""
    taken = {shown(one.combination[key.name]) for one in points if one.kept[key.name]}
    return all(shown(value) in taken for value in key.values)


def _distinct(points: Sequence[_Tried]) -> tuple[GridPoint, ...]:
    """Return each experiment once: where a value does not act, points that differ by it alone are one."""
    found: dict[str, GridPoint] = {}
    for one in points:
        values = {name: one.settings.value(name) for name in one.combination}
        # Compared as written: 1 client a round is not 1.0 of them.
        found.setdefault(one.settings.model_dump_json(), GridPoint(values, one.settings))
    return tuple(found.values())
