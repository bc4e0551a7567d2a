"""Give each client the value set for its name, once the partition has said who the clients are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedloom.config.schema import PER_CLIENT, Settings
from fedloom.config.setting import shown
from fedloom.errors import SettingsError
from fedloom.names import name_order
from fedloom.wording import nearest

_SHOWN = 12


def without_clients(settings: Settings, names: Sequence[str], left_out: Sequence[str]) -> Settings:
    """Return the settings for the clients ``names`` alone, where ``left_out`` were counted too.

    Raises:
        SettingsError: fewer are left than a round needs.
    """
    if not left_out or settings.federation.num_clients == len(names):
        return settings
    counted = sorted([*names, *left_out], key=name_order)
    federation: dict[str, object] = {"num_clients": len(names)}
    if isinstance(settings.federation.clients_per_round, int):
        federation["clients_per_round"] = min(settings.federation.clients_per_round, len(names))
    if settings.federation.min_clients > len(names):
        raise SettingsError(
            f"federation.min_clients: expected at most the {len(names)} clients with a usable row, got "
            f"{settings.federation.min_clients}; lower it"
        )
    updates: dict[str, dict[str, object]] = {"federation": federation}
    for name in PER_CLIENT:
        value, (table, _, key) = settings.value(name), name.partition(".")
        if isinstance(value, dict):
            updates.setdefault(table, {})[key] = {one: value[one] for one in value if one not in left_out}
        elif isinstance(value, tuple):
            kept = (one for client, one in zip(counted, value, strict=True) if client not in left_out)
            updates.setdefault(table, {})[key] = tuple(kept)
    return _updated(settings, updates)


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
    return _updated(settings, tables)


def _updated(settings: Settings, tables: Mapping[str, Mapping[str, object]]) -> Settings:
    return settings.model_copy(
        update={table: getattr(settings, table).model_copy(update=dict(update)) for table, update in tables.items()}
    )


def _problems(settings: Settings, name: str, names: Sequence[str]) -> list[str]:
    value = settings.value(name)
    if not isinstance(value, dict):
        return []
    unknown = [client for client in value if client not in set(names)]
    missing = [client for client in names if client not in value]
    wanted = f"{name}: expected a value for each client ({_listed(names)})"
    if unknown:
        close = nearest(unknown[0], missing)
        action = f"did you mean {close}?" if close else "remove it or correct its name"
        return [f"{wanted}, got one for {shown(unknown[0])}, which is not a client; {action}"]
    if missing:
        return [f"{wanted}, got none for {_listed(missing)}; add what is missing"]
    return []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
