"""Put rows together by the value of a column: numbered for partitions, named for figures reported by group."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.data.sources import Rows
from fedloom.errors import DataError

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


def by_unit(rows: Rows, column: str | None, owners: Sequence[str] | None = None) -> Rows:
    """Return rows put together by a column that names whose each is; as they are where there is none.

    Where rows have ``owners`` already, a name is one at an owner: patient 7 of another hospital is another unit.

    Numbers and texts that are written alike are one unit, with the blanks around them left out: 7, 7.0 and ``" 7"``.
    Two units taken for one are hidden together; one taken for two would be hidden less than is said, so a row without
    a name is refused.

    Raises:
        DataError: a row lacks the column, or has nothing in it, or what is neither text nor a number.
    """
    if column is None:
        return rows
    values = rows.column(column)
    names = [_unit_name(value) for value in values]
    for index, name in enumerate(names):
        if name is None:
            raise DataError(
                f"{rows.where(index)}: expected a text or a number in the column {column!r} (data.unit_column), got "
                f"{'nothing' if _is_missing(values[index]) else repr(values[index])[:40]}; say whose the row is, or "
                "remove it: of rows that nobody names, those of one person would not be hidden together"
            )
    pairs = list(zip(owners if owners is not None else [""] * len(names), names, strict=True))
    return replace(rows, grouped=group(pairs)[1])


def _unit_name(value: Any) -> str | None:
    """Return how a unit is called; None for what is no name."""
    match value:
        case bool():
            return None
        case str():
            return unicodedata.normalize("NFC", value).strip() or None
        case int():
            return str(value)
        case float() if value.is_integer():
            return str(int(value))
        case float():
            return repr(value) if np.isfinite(value) else None
        case _:
            return None


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def members(group_of_row: npt.NDArray[np.int64], num_groups: int) -> list[npt.NDArray[np.int64]]:
    """Return the rows of each group, in rising order."""
    order = np.argsort(group_of_row, kind="stable")
    return np.split(order, np.cumsum(np.bincount(group_of_row, minlength=num_groups))[:-1])
