"""Natural clients that the data name and that have no row to train on: found, and left out where that is allowed."""

from __future__ import annotations

from fedloom.config import Settings
from fedloom.data.sources import Rows
from fedloom.errors import DataError
from fedloom.names import name_order


def _owners(settings: Settings, rows: Rows) -> list[str]:
    column = settings.partition.column
    return rows.client_of_file() if column is None else list(map(str, rows.column(column)))


def natural_owners(settings: Settings, rows: Rows) -> list[str] | None:
    """Return whose client's each row is where the data say so; None where rows are dealt."""
    return _owners(settings, rows) if settings.partition.scheme == "natural" and settings.data.unit_column else None


def emptied(settings: Settings, read: Rows, training: Rows) -> tuple[str, ...]:
    """Return the clients that the data name and that have no row to train on."""
    if settings.partition.scheme != "natural" or settings.partition.path is not None:
        return ()
    return tuple(sorted(set(_owners(settings, read)) - set(_owners(settings, training)), key=name_order))


def without_emptied(settings: Settings, training: Rows, left_out: tuple[str, ...], told: str) -> Settings:
    """Return the settings for the clients that have rows.

    Raises:
        DataError: the emptied ones are counted and may not be left out.
    """
    left, federation = len(set(_owners(settings, training))), settings.federation
    if federation.num_clients == left:
        return settings
    counts_all = federation.num_clients == left + len(left_out)
    if not counts_all or settings.partition.empty == "error":
        instead = ', or partition.empty = "drop"' if counts_all else ""
        raise DataError(
            f"federation.num_clients: expected {left}, the clients with a row to train on, got "
            f"{federation.num_clients}: none is left of client {', '.join(left_out)} ({told or 'all are held out'}); "
            f"set federation.num_clients = {left}{instead}"
        )
    return settings.model_copy(update={"federation": federation.model_copy(update={"num_clients": left})})
