"""Which column tells rows apart, and which rows it puts together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedloom.data.groups import MOST_GROUPS, grouping_of
from fedloom.data.sources import Rows


def rows_of(rows: list[dict[str, Any]]) -> Rows:
    return Rows(rows, ("a.json",), np.zeros(len(rows), np.int64), np.arange(len(rows)))


def test_groups_come_in_alphabetical_order_with_their_rows() -> None:
    grouping = grouping_of(rows_of([{"category": name} for name in ("b", "a", "b")]))
    assert grouping is not None
    assert [(name, which.tolist()) for name, which in grouping.members()] == [("a", [1]), ("b", [0, 2])]


@pytest.mark.parametrize(
    ("rows", "wanted", "column"),
    [
        ([{"task": "x", "category": "a"}, {"task": "y", "category": "b"}], "task", "task"),
        ([{"task": "x", "category": "a"}, {"task": "y", "category": "b"}], None, "category"),
        ([{"task": "x", "category": "a"}, {"task": "y"}], None, "task"),  # not every row has a category
        ([{"user": f"u{k}", "label": k % 2} for k in range(MOST_GROUPS + 1)], "user", "label"),  # too many users
    ],
)
def test_the_column_is_the_named_one_or_the_first_that_tells_rows_apart(
    rows: list[dict[str, Any]], wanted: str | None, column: str
) -> None:
    grouping = grouping_of(rows_of(rows), wanted)
    assert grouping is not None
    assert grouping.column == column


@pytest.mark.parametrize("rows", [[{"text": "x"}], [{"category": "a"}, {"category": "a"}]])
def test_rows_that_nothing_tells_apart_have_no_groups(rows: list[dict[str, Any]]) -> None:
    assert grouping_of(rows_of(rows)) is None
