"""Put rows together by the value of a column: numbered for partitions, named for figures reported by group."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedloom.data.sources import Rows

GROUPING_COLUMNS = ("category", "task", "label")
MOST_GROUPS = 50


@dataclass(frozen=True)
class Grouping:
    """The column that distinguishes rows, and its value in every row."""

    column: str
    of_row: tuple[str, ...]

    def members(self) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        """Yield every group, in alphabetical order, with the positions of its rows."""
        names, group_of_row = group(self.of_row)
        yield from sorted(zip(names, members(group_of_row, len(names)), strict=True), key=lambda entry: entry[0])


def grouping_of(rows: Rows, column: str | None = None) -> Grouping | None:
    """Return the groups of ``rows`` by ``column``, else by the first of ``GROUPING_COLUMNS`` that distinguishes them.

    A column does so that every row has, with at least two values and at most ``MOST_GROUPS``; None where none does.
    """
    for name in GROUPING_COLUMNS if column is None else (column, *GROUPING_COLUMNS):
        of_row = tuple(str(row[name]) for row in rows.rows if name in row)
        if len(of_row) == len(rows) and 1 < len(set(of_row)) <= MOST_GROUPS:
            return Grouping(name, of_row)
    return None


def group(values: Sequence[Hashable]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the distinct values as text, in first-seen order, and each row's position among them."""
    number_of: dict[str, int] = {}
    group_of_row = np.fromiter(
        (number_of.setdefault(str(value), len(number_of)) for value in values), np.int64, count=len(values)
    )
    return list(number_of), group_of_row


def members(group_of_row: npt.NDArray[np.int64], num_groups: int) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each group, in rising order."""
    order = np.argsort(group_of_row, kind="stable")
    return np.split(order, np.cumsum(np.bincount(group_of_row, minlength=num_groups))[:-1])
