"""Which column tells rows apart, and which rows it puts together."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fedloom.data.groups import MOST_GROUPS, by_unit, grouping_of
from fedloom.data.sources import Rows
from fedloom.errors import DataError


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


def test_rows_of_a_unit_are_those_written_alike_as_text_or_number() -> None:
    values = ["7", 7, 7.0, " 7\t", "007", 7.5, "7.5", "Zo\u0308e", "Zöe", "zöe", -7]
    rows = by_unit(rows_of([{"patient": value} for value in values]), "patient")
    assert rows.units.tolist() == [0, 0, 0, 0, 1, 2, 2, 3, 3, 4, 5]
    assert rows.units_of(np.array([10, 1, 1])).tolist() == [5, 0, 0]
    some = rows.select([4, 5, 6, 10])
    assert some.units.tolist() == [0, 1, 1, 2], "counted anew"
    assert [row["patient"] for row in some.one_of_each_unit().rows] == ["007", 7.5, -7]
    assert some.distinct() is some, "which rows are one row of a file is another question"
    own = by_unit(rows_of([{"patient": value} for value in (1, 2, 1, 1)]), "patient", ["a", "a", "b", "a"])
    assert own.units.tolist() == [0, 1, 2, 0], "of another owner is another"
    plain = rows_of([{}, {}])
    assert by_unit(plain, None) is plain


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "nothing"),
        ("", "nothing"),
        (" \t", "nothing"),
        (float("nan"), "nothing"),
        (float("inf"), "inf"),
        (True, "True"),
        (["a"], "['a']"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_a_row_that_names_no_unit_is_refused_with_its_place(value: object, got: str) -> None:
    said = rf"a.json row 1: expected a text or a number in the column 'patient' .*, got {re.escape(got)}; say whose"
    with pytest.raises(DataError, match=said):
        by_unit(rows_of([{"patient": "a"}, {"patient": value}]), "patient")
    with pytest.raises(DataError, match="expected a column 'patient', found other"):
        by_unit(rows_of([{"other": "a"}]), "patient")
