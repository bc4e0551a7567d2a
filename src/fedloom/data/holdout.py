"""Set rows aside before they are given to clients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedloom.data.groups import group, members
from fedloom.data.partition import Partition
from fedloom.errors import DataError


@dataclass(frozen=True)
class HoldOut:
    """Positions of the rows that stay and of those held out, each in rising order."""

    kept: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]


def hold_out(num_rows: int, amount: float, rng: np.random.Generator) -> HoldOut:
    """Set aside ``amount`` rows at random: a number of rows (int) or a fraction of them (float below 1).

    Raises:
        DataError: the amount is not positive or would leave no row.
    """
    return _split(num_rows, rng.permutation(num_rows)[: _count(num_rows, amount, "the data")])


def hold_out_units(rows_of_unit: npt.NDArray[np.int64], amount: float, rng: np.random.Generator) -> HoldOut:
    """Set aside units at random, given by their rows: a fraction of them, or as many as have ``amount`` rows (int).

    Raises:
        DataError: the amount is not positive or would leave no unit.
    """
    if not isinstance(amount, int):
        return hold_out(len(rows_of_unit), amount, rng)
    count, order = _count(int(rows_of_unit.sum()), amount, "the data"), rng.permutation(len(rows_of_unit))
    held = order[: 1 + int(np.searchsorted(np.cumsum(rows_of_unit[order]), count))]
    if len(held) == len(order):
        raise DataError(
            f"hold-out of {amount} from the data: expected one of its {len(order)} units to be left, got none, since "
            "all rows of a unit are held out together; lower it"
        )
    return _split(len(order), held)


def hold_out_by_category(categories: Sequence[Hashable], amount: float, rng: np.random.Generator) -> HoldOut:
    """Set aside ``amount`` rows of each category: a number (int) or a fraction (float below 1).

    Source: FedIT holds out 10 rows of each of Dolly's 8 categories.

    Raises:
        DataError: a category has too few rows to leave one.
    """
    names, group_of_row = group(categories)
    held = [
        rng.permutation(members)[: _count(len(members), amount, f"category {names[number]!r}")]
        for number, members in enumerate(members(group_of_row, len(names)))
    ]
    return _split(len(categories), np.concatenate(held))


def hold_out_of_clients(
    partition: Partition, unit_of_row: npt.NDArray[np.int64], share: float, draw: Callable[[int], np.random.Generator]
) -> HoldOut:
    """Set aside a share of each client's rows, at least one and never all; ``draw`` gives a client's generator.

    All rows of a unit stay, or are held out, together. Of a client with a single unit nothing is held out.
    """
    held = [np.zeros(0, np.int64)]
    for client in range(partition.num_clients):
        rows = partition.rows_of(client)
        units = np.unique(unit_of_row[rows])
        count = min(len(units) - 1, max(1, round(share * len(units))))
        held.append(rows[np.isin(unit_of_row[rows], draw(client).permutation(units)[:count])])
    return _split(partition.num_rows, np.concatenate(held))


def hold_out_of_owners(owner_of_row: npt.NDArray[np.int64], amount: float, rng: np.random.Generator) -> HoldOut:
    """Set aside ``amount`` rows at random, of which every owner keeps at least one; an amount as in :func:`hold_out`.

    Raises:
        DataError: the amount is not positive, or would leave an owner none.
    """
    order = rng.permutation(len(owner_of_row))
    _, kept_at = np.unique(owner_of_row[order], return_index=True)
    spare = np.delete(order, kept_at)
    count = _count(len(order), amount, "the rows to train on")
    if count > len(spare):
        raise DataError(
            f"hold-out of {amount} from the rows to train on: expected one row to be left to each of the "
            f"{len(kept_at)} clients, got {len(order)} rows in all; lower it, or use more rows"
        )
    return _split(len(order), spare[:count])


def with_units(split: HoldOut, unit_of_row: npt.NDArray[np.int64]) -> HoldOut:
    """Return the hold-out of rows from one of units: all rows of a unit stay, or are held out, together."""
    return _split(len(unit_of_row), np.flatnonzero(np.isin(unit_of_row, split.held)))


def _count(num_rows: int, amount: float, place: str) -> int:
    count = amount if isinstance(amount, int) else round(amount * num_rows)
    is_fraction = isinstance(amount, int) or 0 < amount < 1
    if not is_fraction or not 0 < count < num_rows:
        raise DataError(
            f"hold-out of {amount} from {place}: expected a number of rows or a fraction that leaves at least one "
            f"of its {num_rows} rows on each side; change it"
        )
    return int(count)


def _split(num_rows: int, held: npt.NDArray[np.int64]) -> HoldOut:
    is_held = np.zeros(num_rows, np.bool_)
    is_held[held] = True
    return HoldOut(np.flatnonzero(~is_held), np.flatnonzero(is_held))
