"""What a comparison sets for one of its methods alone: ``METHOD:table.setting=value``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedloom.config.checks import ALTERNATIVES
from fedloom.config.loading import OVERRIDE, check, parse_overrides, replaced
from fedloom.config.schema import Settings
from fedloom.config.variants import with_method
from fedloom.errors import SettingsError
from fedloom.methods import table
from fedloom.wording import either

OPTION = "--set"
TUNABLE = ("method", "server", "federation", "training", "split", "wire")
"""Tables that say how a method learns. The others say what is compared, and on what."""
CHOSEN = {"method.name": "--methods names the methods", "run.seed": "--seeds names the seeds"}
COMPARED = (*CHOSEN, "federation.num_clients", "federation.participation")
"""Settings of those tables that say what is compared all the same."""


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides for all methods, and those that name one."""
    common = [one for one in overrides if scope_of(one)[0] is None]
    return common, [one for one in overrides if one not in common]


def scope_of(override: str) -> tuple[str | None, str]:
    """Return the method that stands before a colon, None where there is none, and the rest."""
    before, colon, after = override.partition(":")
    return (before.strip(), after) if colon and "=" not in before else (None, override)


def own_settings(overrides: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return by method what is set for it alone, by the setting's full name.

    Raises:
        SettingsError: an override has another form, names a method that is not compared, or a setting that must be the
            same for all.
    """
    found: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for override in overrides:
        method, setting = scope_of(override)
        if method is None or OVERRIDE.fullmatch(setting) is None:
            raise SettingsError(
                f"{OPTION} {override}: expected METHOD:table.setting=value, got {override!r}; write e.g. "
                f"{methods[0]}:training.learning_rate=1e-3"
            )
        check_compared(OPTION, override, method, methods)
        (name, value), *_ = parse_overrides([setting]).items()
        refuse_shared(OPTION, override, name)
        found[method][name] = value
    return found


def check_compared(option: str, given: str, method: str, methods: Sequence[str]) -> None:
    """Check that the method before a colon is one of those that are compared.

    Raises:
        SettingsError: it is not.
    """
    if method not in methods:
        known = ", ".join(methods)
        advice = "add it to --methods, or drop this" if table.has(method) else table.remedy(method, methods)
        raise SettingsError(f"{option} {given}: expected one of the methods {known}, got {method!r}; {advice}")


def refuse_shared(option: str, given: str, name: str) -> None:
    """Check that a setting may differ between the methods of a comparison.

    Raises:
        SettingsError: it says what is compared, or on what.
    """
    part = name.partition(".")[0]
    if name in COMPARED or (part not in TUNABLE and part in Settings.model_fields):
        tables = either(f"[{one}]" for one in TUNABLE)
        chooser = CHOSEN.get(name, "set it for all with --set")
        raise SettingsError(
            f"{option} {given}: expected a setting of {tables}, got {name}, which says what is compared and is the "
            f"same for all runs; {chooser}, or drop it"
        )


def rivals(name: str, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that cannot be set besides ``name``: itself, and its alternatives."""
    groups = [group for group in ALTERNATIVES if name in group]
    return [other for other in names if other == name or any(other in group for group in groups)]


def of_method(settings: Settings, method: str, own: Mapping[str, Any]) -> Settings:
    """Return the experiment with another method, and with what is set for that method alone.

    A method's own setting wins over the recipe's and over one for all methods. What acts only without it goes back to
    its default.

    Raises:
        SettingsError: a line per problem.
    """
    origins = origins_of(method, own)
    try:
        changed = with_method(replaced(settings, own, origins) if own else settings, method, keep=own)
        check(changed, origins=origins)
    except SettingsError as error:
        raise told_of(method, error) from None
    return changed


def origins_of(method: str, own: Iterable[str]) -> dict[str, str]:
    """Say by name where a method's own settings come from."""
    return dict.fromkeys(own, f"{OPTION} {method}:")


def told_of(method: str, error: SettingsError) -> SettingsError:
    """Return the error with the method that each of its lines is about."""
    return SettingsError("\n".join(f"{method}: {line}" for line in str(error).splitlines()))
