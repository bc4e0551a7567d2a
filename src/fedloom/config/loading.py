"""From a recipe and ``--set`` to settings: one TOML document, one kind of override, every problem at once."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedloom.config import checks, files
from fedloom.config.problems import Problem, refuse, schema_problems, suggestion
from fedloom.config.schema import Settings
from fedloom.config.variants import filled_in, with_method
from fedloom.errors import SettingsError

Document = dict[str, Any]
Check = Callable[[Settings], list[Problem]]

OVERRIDE = re.compile(r"\s*([\w-]+)\.([\w-]+)\s*=(.*)", re.DOTALL)
EVERY_CHECK: tuple[Check, ...] = (checks.problems, files.problems)


def load(path: str | Path, overrides: Sequence[str] = (), *, also: Sequence[Check] = EVERY_CHECK) -> Settings:
    """Read a recipe (TOML) or a run's ``config.json`` and apply ``--set`` overrides, in order.

    Raises:
        SettingsError: a line per problem, when anything cannot be used.
    """
    path = Path(path)
    return resolve(read(path), str(path), overrides, also=also)


def read(path: Path) -> Document:
    """Parse a TOML or JSON file, with or without a byte-order mark.

    Raises:
        SettingsError: the file is absent, is not text, or does not parse.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{path}: expected a TOML file, got {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: expected UTF-8 text, got other bytes; name a TOML file") from error
    except ValueError as error:
        raise SettingsError(
            f"{path}: expected the name of a recipe, got one with a NUL character; name a file"
        ) from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Document:
    """Parse the text of a recipe; ``source`` (its file name) distinguishes JSON from TOML and is part of the message.

    Raises:
        SettingsError: the text does not parse.
    """
    kind = "JSON" if source.endswith(".json") else "TOML"
    try:
        document = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "too many brackets in one another" if isinstance(error, RecursionError) else f"a syntax error: {error}"
        raise SettingsError(f"{source}: expected {kind}, got {reason}; correct the file") from error
    if not isinstance(document, dict):
        raise SettingsError(
            f"{source}: expected tables of settings, got {type(document).__name__}; see docs/settings.md"
        )
    return document


def resolve(
    document: Mapping[str, Any], source: str, overrides: Sequence[str] = (), *, also: Sequence[Check] = EVERY_CHECK
) -> Settings:
    """Turn a parsed document and overrides into settings.

    Settings that fail the schema are reported, replaced by their defaults, and everything that does not depend on them
    is checked all the same. An override that names another method than the document sets aside what of the document
    only the document's method can use, as a comparison does (:func:`fedloom.config.variants.with_method`); what other
    overrides name is kept and checked.

    Raises:
        SettingsError: a line per problem.
    """
    merged, origins = merge(document, source, overrides)
    settings, found = _validated(merged)
    given = {f"{table}.{key}" for table, keys in merged.items() if isinstance(keys, Mapping) for key in keys}
    settings = filled_in(settings, given)
    if _names_another_method(document, overrides):
        settings = with_method(settings, settings.method.name, keep=parse_overrides(overrides))
    suspect = {problem.setting for problem in found}
    try:
        later = [problem for check in also for problem in check(settings)]
    except OSError as error:  # a name that no file can have, or one that may not be looked at
        raise SettingsError(
            f"{str(error.filename)[:80]}: expected a file or folder to use, got {error.strerror}; check name and rights"
        ) from error
    found += [problem for problem in later if suspect.isdisjoint((problem.setting, *problem.about))]
    refuse(found, origins)
    return settings


def _names_another_method(document: Mapping[str, Any], overrides: Sequence[str]) -> bool:
    there, named = document.get("method"), parse_overrides(overrides).get("method.name")
    return named is not None and isinstance(there, Mapping) and named != there.get("name", named)


def check(settings: Settings, *, also: Sequence[Check] = EVERY_CHECK, origins: Mapping[str, str] | None = None) -> None:
    """Check settings that were made in Python; ``origins`` say by name where values came from.

    Raises:
        SettingsError: a line per problem.
    """
    refuse([problem for one in also for problem in one(settings)], origins or {})


def merge(document: Mapping[str, Any], source: str, overrides: Sequence[str]) -> tuple[Document, dict[str, str]]:
    """Lay overrides over a document; return it with where each setting came from.

    ``a.b=`` takes ``a.b`` back to its default. Of alternatives (``training.local_steps`` and ``local_epochs``; the ways
    to hold rows out) the one that ``--set`` names replaces the one in the file.

    Raises:
        SettingsError: an override that is not ``table.setting=value``.
    """
    return _laid_over(document, source, parse_overrides(overrides), {})


def replaced(settings: Settings, values: Mapping[str, Any], options: Mapping[str, str]) -> Settings:
    """Return settings with other values by full name, None for the default; alternatives are replaced as by ``--set``.

    What one setting demands of another is not checked.

    Raises:
        SettingsError: a value does not fit its setting; ``options`` say by name where values came from.
    """
    merged, origins = _laid_over(settings.as_dict(), "the recipe", values, options)
    changed, found = _validated(merged)
    refuse(found, origins)
    return changed


def _laid_over(
    document: Mapping[str, Any], source: str, parsed: Mapping[str, Any], options: Mapping[str, str]
) -> tuple[Document, dict[str, str]]:
    merged = {table: dict(values) if isinstance(values, Mapping) else values for table, values in document.items()}
    origins = {f"{table}.{key}": source for table, keys in merged.items() if isinstance(keys, dict) for key in keys}
    origins |= dict.fromkeys(merged, source)
    for name in parsed:
        for group in checks.ALTERNATIVES:
            for other in set(group).difference(parsed) if name in group else ():
                _drop(merged, other)
    for name, value in parsed.items():
        _assign(merged, name, value)
        origins[name] = options.get(name, "--set")
        origins.setdefault(name.partition(".")[0], origins[name])
    return merged, origins


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read overrides of the form ``table.setting=value`` by the setting's full name; the last of a name counts.

    Raises:
        SettingsError: one has another form.
    """
    parsed: dict[str, Any] = {}
    malformed = []
    for override in overrides:
        match = OVERRIDE.fullmatch(override)
        if match is None:
            meant = suggestion(override.partition("=")[0].strip())
            action = meant if meant.startswith("did") else "e.g. --set run.seed=2"
            malformed.append(f"--set {override}: expected table.setting=value, got {override!r}; {action}")
            continue
        parsed[f"{match[1]}.{match[2]}"] = parse_value(match[3].strip())
    if malformed:
        raise SettingsError("\n".join(malformed))
    return parsed


def parse_value(text: str) -> Any:
    """Read the value of an override as TOML, or as bare text when it is not TOML; nothing means the default."""
    if not text:
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def _assign(merged: Document, name: str, value: Any) -> None:
    table, _, key = name.partition(".")
    if value is None:
        _drop(merged, name)
    elif isinstance(merged.setdefault(table, {}), dict):
        merged[table][key] = value


def _drop(merged: Document, name: str) -> None:
    table, _, key = name.partition(".")
    if isinstance(merged.get(table), dict):
        merged[table].pop(key, None)


def _validated(document: Document) -> tuple[Settings, list[Problem]]:
    try:
        return Settings.model_validate(frozen(document)), []
    except ValidationError as error:
        found = schema_problems(error, document)
    usable = {table: dict(keys) if isinstance(keys, dict) else keys for table, keys in document.items()}
    for problem in found:
        if "." in problem.setting and problem.setting not in usable:  # a table's name may hold a dot too
            _drop(usable, problem.setting)
        else:
            usable.pop(problem.setting, None)
    return Settings.model_validate(frozen(usable)), found


def frozen(value: Any) -> Any:
    """Return a parsed value with its lists as tuples, as the tables want them."""
    if isinstance(value, list):
        return tuple(map(frozen, value))
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return value
