"""Give each client the value set for its name, once the partition has said who the clients are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fedloom.config.schema import PER_CLIENT, Settings
from fedloom.config.setting import shown
from fedloom.errors import SettingsError

_SHOWN = 12


def resolve_names(settings: Settings, names: Sequence[str]) -> Settings:
    """Return the settings with every table of name = value as the list of its values, in the order of ``names``.

    Raises:
        SettingsError: a table names someone who is not a client, or misses one; a line per table.
    """
    problems = [line for name in PER_CLIENT for line in _problems(settings, name, names)]
    if problems:
        raise SettingsError("\n".join(problems))
    tables: dict[str, dict[str, object]] = {}
    for name in PER_CLIENT:
        value = settings.value(name)
        if isinstance(value, dict):
            table, _, key = name.partition(".")
            tables.setdefault(table, {})[key] = tuple(value[client] for client in names)
    return settings.model_copy(
        update={table: getattr(settings, table).model_copy(update=update) for table, update in tables.items()}
    )


def _problems(settings: Settings, name: str, names: Sequence[str]) -> list[str]:
    value = settings.value(name)
    if not isinstance(value, dict):
        return []
    unknown = [client for client in value if client not in set(names)]
    missing = [client for client in names if client not in value]
    wanted = f"{name}: expected a value for each client ({_listed(names)})"
    if unknown:
        close = difflib.get_close_matches(unknown[0], missing, 1, 0.5)
        action = f"did you mean {close[0]}?" if close else "remove it or correct its name"
        return [f"{wanted}, got one for {shown(unknown[0])}, which is not a client; {action}"]
    if missing:
        return [f"{wanted}, got none for {_listed(missing)}; add what is missing"]
    return []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
