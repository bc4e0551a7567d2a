"""What a comparison tries for each method before it runs it: ``--grid [METHOD:]table.setting=value,value,...``.

Settings that go together are joined by ``/``, names and values:
``federation.num_rounds/training.local_steps=5/20,20/5``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
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
JOINT = "/"
"""Between settings that go together, and between their values."""
MOST_POINTS = 1000


@dataclass(frozen=True)
class GridKey:
    """Settings that change together, mostly one, for one method or for all; ``given`` is how it was written.

    ``choices`` are their values in the order of ``names``.
    """

    given: str
    method: str | None
    names: tuple[str, ...]
    choices: tuple[tuple[Any, ...], ...]

    def rivals(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` that cannot be set besides these."""
        others = list(names)
        return [rival for name in self.names for rival in rivals(name, others)]


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
        joined, equals, text = rest.partition("=")
        matches = [OVERRIDE.fullmatch(f"{name}{equals}{text}") for name in joined.split(JOINT)]
        names = tuple(f"{match[1]}.{match[2]}" for match in matches if match is not None)
        if len(names) < len(matches):
            raise SettingsError(
                f"{OPTION} {given}: expected [METHOD:]table.setting=value,value,..., got {given!r}; write e.g. "
                "training.learning_rate=1e-3,2e-3"
            )
        if method is not None:
            check_compared(OPTION, given, method, methods)
        for place, name in enumerate(names):
            refuse_shared(OPTION, given, name)
            others = (other for key in keys if key.method == method for other in key.names)
            if earlier := rivals(name, (*others, *names[:place])):
                raise SettingsError(
                    f"{OPTION} {given}: expected one grid of {either(dict.fromkeys((*earlier, name)))}, got two; "
                    "drop one"
                )
        keys.append(GridKey(given, method, names, _choices(given, len(names), text.strip())))
    return keys


def _choices(given: str, num_names: int, text: str) -> tuple[tuple[Any, ...], ...]:
    """Read what is between commas: a value for each of the names that go together."""
    if num_names == 1:
        return tuple((value,) for value in _values(given, text))
    choices = []
    for one in text.split(","):
        parts = [part.strip() for part in one.split(JOINT)]
        if len(parts) != num_names or "" in parts:
            raise SettingsError(
                f"{OPTION} {given}: expected {num_names} values joined by {JOINT} between two commas, one for each "
                f"setting, got {one.strip()!r}; write e.g. {JOINT.join(map(str, range(1, num_names + 1)))}"
            )
        choices.append(tuple(map(parse_value, parts)))
    _refuse_repeated(given, [JOINT.join(map(shown, one)) for one in choices])
    return tuple(choices)


def _values(given: str, text: str) -> tuple[Any, ...]:
    """Read values between commas: as one TOML list, or one by one where they are bare text."""
    listed = parse_value(f"[{text}]")
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise SettingsError(
            f"{OPTION} {given}: expected values separated by commas, got an empty one; give each a value"
        )
    values = listed if isinstance(listed, list) else [parse_value(part) for part in parts]
    _refuse_repeated(given, list(map(shown, values)))
    return tuple(values)


def _refuse_repeated(given: str, values: Sequence[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise SettingsError(f"{OPTION} {given}: expected each value once, got {value} twice; remove one")


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
        if key.method is None and all(key.names[0] in grid.skipped for grid in grids):
            reasons = "; ".join(dict.fromkeys(f"{grid.method}: {grid.skipped[key.names[0]]}" for grid in grids))
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
        if key.method is None and (both := key.rivals(overrides)):
            raise SettingsError(
                f"{OPTION} {key.given}: expected no --set {both[0]} besides, got both; drop one, or set it for one "
                f"method: --set METHOD:{both[0]}=..."
            )


def _grid_of(settings: Settings, method: str, own: Mapping[str, Any], keys: Sequence[GridKey]) -> MethodGrid:
    mine = [key for key in keys if key.method == method]
    for key in mine:
        if both := key.rivals(own):
            raise SettingsError(f"--grid {key.given}: expected no --set {method}:{both[0]} besides, got both; drop one")
    skipped: dict[str, str] = {}
    for key in (key for key in keys if key.method is None):
        if key.rivals(name for one in mine for name in one.names):
            skipped |= dict.fromkeys(key.names, "it has a grid of its own")
        elif key.rivals(own):
            skipped |= dict.fromkeys(key.names, "it has a value of its own")
        else:
            mine.append(key)
    while True:
        points = _points(settings, method, own, mine)
        idle = [key for key in mine if not _acts(key, points)]
        if not idle:
            return MethodGrid(method, _distinct(points), skipped)
        for key in idle:
            if key.method is not None:
                name = JOINT.join(key.names)
                raise SettingsError(
                    f"{OPTION} {key.given}: expected a setting that acts with {method}, got {name}; drop it"
                )
            skipped |= dict.fromkeys(key.names, "it does not act")
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
    ordered = sorted(keys, key=lambda key: order.index(key.names[0]) if key.names[0] in order else len(order))
    names = [name for key in ordered for name in key.names]
    combinations = [sum(choices, ()) for choices in itertools.product(*(key.choices for key in ordered))]
    if len(combinations) > MOST_POINTS:
        raise SettingsError(
            f"{OPTION}: expected at most {MOST_POINTS:,} points for {method}, got {len(combinations):,}; narrow it"
        )
    return [_tried(settings, method, own, dict(zip(names, one, strict=True))) for one in combinations]


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
    """Tell whether the method takes every value of a setting, each at some point of the others.

    Of settings that go together one is enough.
    """
    for name, values in zip(key.names, zip(*key.choices, strict=True), strict=True):
        taken = {shown(one.combination[name]) for one in points if one.kept[name]}
        if all(shown(value) in taken for value in values):
            return True
    return False


def _distinct(points: Sequence[_Tried]) -> tuple[GridPoint, ...]:
    """Return each experiment once: where a value does not act, points that differ by it alone are one."""
    found: dict[str, GridPoint] = {}
    for one in points:
        values = {name: one.settings.value(name) for name in one.combination}
        # Compared as written: 1 client a round is not 1.0 of them.
        found.setdefault(one.settings.model_dump_json(), GridPoint(values, one.settings))
    return tuple(found.values())
