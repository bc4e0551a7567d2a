"""Rows divided into those to train on and those held out, and the former among the clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedloom.config import Settings
from fedloom.config.files import clients_may_be_lost
from fedloom.config.schema import PER_CLIENT
from fedloom.data.division import Division, Scheme, divide
from fedloom.data.holdout import HoldOut, hold_out_by_category, hold_out_units, with_units
from fedloom.data.partition import Partition
from fedloom.data.sources import Rows, client_names_of_files
from fedloom.data.tokens import TokenSet
from fedloom.errors import PartitionError
from fedloom.names import name_order
from fedloom.run_folder.contents import check_in_run
from fedloom.seeding import stream


def divided(settings: Settings, rows: Rows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return the positions of the training rows and of the held-out ones."""
    amount = settings.data.eval_rows if settings.data.eval_rows is not None else settings.data.eval_fraction
    if amount is None:
        return np.arange(len(rows)), None
    split = with_units(_held_out(settings, rows, amount), rows.units)
    return split.kept, split.held


def _held_out(settings: Settings, rows: Rows, amount: float) -> HoldOut:
    """Draw the held-out units; a fraction of a natural federation is drawn from every client."""
    rng, whole = stream(settings.run.seed, "hold-out"), rows.one_of_each_unit()
    natural = settings.partition.scheme == "natural"
    if natural and isinstance(amount, float):
        column = settings.partition.column
        return hold_out_by_category(whole.client_of_file() if column is None else whole.column(column), amount, rng)
    return hold_out_units(np.bincount(rows.distinct().units), amount, rng)


def partition_of(settings: Settings, rows: Rows, tokens: TokenSet, sha256: str, saved: Path | None) -> Partition:
    """Return who owns which row: as drawn, as a file says, or as a run has ``saved`` it.

    Raises:
        PartitionError: the number of clients is another than the settings say, rows cannot be divided as asked, or a
            saved partition is of other rows.
    """
    wanted, table = settings.federation.num_clients, settings.partition
    if saved is not None:
        return Partition.load(saved, sha256)
    if table.path is not None:
        check_in_run(Path(table.path))
        partition = Partition.load(Path(table.path), sha256)
    else:
        division = Division(
            scheme=Scheme(table.scheme),
            num_clients=None if table.scheme == "natural" else wanted,
            column=table.column,
            concentration=table.concentration,
            min_rows=table.min_rows,
            shards_per_client=table.shards_per_client,
            categories_per_client=table.categories_per_client,
            exponent=table.exponent,
        )
        partition = divide(division, rows, tokens, seed=settings.run.seed)
    if partition.num_clients != wanted:
        raise _miscounted(settings, partition.num_clients)
    return partition


def _miscounted(settings: Settings, found: int) -> PartitionError:
    lists = [name for name in PER_CLIENT if isinstance(settings.value(name), tuple)]
    advice = f" and give {found} values in {', '.join(lists)}" if lists else ""
    names = "the data name" if settings.partition.path is None else "the partition has"
    return PartitionError(
        f"federation.num_clients: expected {found}, as many as {names}, got {settings.federation.num_clients}; "
        f"set it to {found}{advice}"
    )


def known_names(settings: Settings, rows: Rows | None = None) -> list[str] | None:
    """Return the clients' names where they are known: those that a column's values give where ``rows`` are read.

    None too where clients may lose all their rows and more are named than are counted.

    Raises:
        DataError: a folder has no files of the split, or a row has no such column.
        PartitionError: rows name another number of clients than the settings say.
    """
    if settings.partition.path is not None:
        return None
    if settings.partition.scheme != "natural":
        return [str(client) for client in range(settings.federation.num_clients)]
    if settings.partition.column is not None:
        return None if rows is None else _names_of_column(settings, rows)
    names = client_names_of_files(settings.data.path, settings.data.split)
    return None if names is None else sorted(names, key=name_order)


def _names_of_column(settings: Settings, rows: Rows) -> list[str] | None:
    assert settings.partition.column is not None
    names = sorted(set(map(str, rows.column(settings.partition.column))), key=name_order)
    wanted = settings.federation.num_clients
    if len(names) == wanted:
        return names
    if wanted < len(names) and clients_may_be_lost(settings):
        return None
    raise _miscounted(settings, len(names))
