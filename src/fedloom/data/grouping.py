"""Which group (category, task, ...) each row is of, so that figures can be told group by group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.data.sources import Rows

GROUPING_COLUMNS = ("category", "task", "label")
MOST_GROUPS = 50


@dataclass(frozen=True)
class Grouping:
    """The column that tells rows apart, and its value in every row."""

    column: str
    of_row: tuple[str, ...]

    def members(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Yield every group, in alphabetical order, with the positions of its rows."""
        of_row = np.array(self.of_row)
        for name in sorted(set(self.of_row)):
            yield name, np.flatnonzero(of_row == name)


def grouping_of(rows: Rows, column: str | None = None) -> Grouping | None:
    """Return the groups of ``rows`` by ``column``, else by the first of ``GROUPING_COLUMNS`` that tells them apart.

    A column does so that every row has, with at least two values and at most ``MOST_GROUPS``; None where none does.
    """
    for name in GROUPING_COLUMNS if column is None else (column, *GROUPING_COLUMNS):
        of_row = tuple(str(row[name]) for row in rows.rows if name in row)
        if len(of_row) == len(rows) and 1 < len(set(of_row)) <= MOST_GROUPS:
            return Grouping(name, of_row)
    return None
