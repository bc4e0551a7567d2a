"""Rows divided into those to train on and those held out, and the former among the clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedloom.config import Settings
from fedloom.config.schema import PER_CLIENT
from fedloom.data.division import Division, Scheme, divide
from fedloom.data.holdout import HoldOut, hold_out, hold_out_by_category, with_units
from fedloom.data.partition import Partition
from fedloom.data.sources import Rows
from fedloom.data.tokens import TokenSet
from fedloom.errors import PartitionError
from fedloom.run_folder.contents import check_in_run
from fedloom.seeding import stream


def divided(settings: Settings, rows: Rows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return the positions of the training rows and of the held-out ones."""
    amount = settings.data.eval_rows if settings.data.eval_rows is not None else settings.data.eval_fraction
    if amount is None:
        return np.arange(len(rows)), None
    split = with_units(_held_out(settings, rows.distinct(), amount), rows.units)
    return split.kept, split.held


def _held_out(settings: Settings, rows: Rows, amount: float) -> HoldOut:
    """Draw the held-out rows; a fraction of a natural federation is drawn from every client."""
    rng = stream(settings.run.seed, "hold-out")
    natural = settings.partition.scheme == "natural"
    if natural and isinstance(amount, float):
        column = settings.partition.column
        return hold_out_by_category(rows.client_of_file() if column is None else rows.column(column), amount, rng)
    return hold_out(len(rows), amount, rng)


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
        lists = [name for name in PER_CLIENT if isinstance(settings.value(name), tuple)]
        advice = f" and give {partition.num_clients} values in {', '.join(lists)}" if lists else ""
        names = "the data name" if table.path is None else "the partition has"
        raise PartitionError(
            f"federation.num_clients: expected {partition.num_clients}, as many as {names}, got {wanted}; "
            f"set it to {partition.num_clients}{advice}"
        )
    return partition
