from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedloom.data import Dialogue, Prompt, Rows, Shape, Turn, read_records
from fedloom.errors import DataError


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows(rows, ("a.json",), np.zeros(len(rows), np.int64), np.arange(1, len(rows) + 1))


DIALOGUE = Dialogue((Turn("system", "S"), Turn("user", "U"), Turn("assistant", "A")))


@pytest.mark.parametrize(
    ("row", "shape", "record"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", Prompt("i", "x", "o")),
        ({"instruction": "i", "output": "o"}, "alpaca", Prompt("i", "", "o")),
        ({"instruction": "i", "context": "c", "response": "r", "category": "q"}, "dolly", Prompt("i", "c", "r")),
        ({"prompt": "p", "completion": "c"}, "prompt-completion", Prompt("p", "", "c")),
        ({"question": "q", "answer": 4}, "question-answer", Prompt("q", "", "4")),
        ({"mr": "name[X]", "ref": "X."}, "e2e", Prompt("name[X]", "", "X.")),
        ({"text": "name : X | Type : pub||X is a pub."}, "e2e", Prompt("name : X | Type : pub", "", "X is a pub.")),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "U"},
                    {"role": "assistant", "content": "A"},
                ]
            },
            "messages",
            DIALOGUE,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "U"},
                    {"from": "gpt", "value": "A"},
                ]
            },
            "sharegpt",
            DIALOGUE,
        ),
    ],
)
def test_auto_tells_every_shape(row: dict[str, Any], shape: str, record: object) -> None:
    records = read_records(rows_of(row))
    assert (records.shape, list(records.items)) == (Shape(shape), [record])
    assert list(read_records(rows_of(row), shape).items) == [record]


def test_columns_rename_what_the_shape_expects() -> None:
    rows = rows_of({"frage": "q", "antwort": "a"})
    columns = {"prompt": "frage", "completion": "antwort"}
    assert list(read_records(rows, columns=columns).items) == [Prompt("q", "", "a")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "i", "output": "o", "response": "r"}, "fit alpaca and dolly; set data.shape"),
        ({"prompt": "p"}, "row 1: its columns are 'prompt', which fit no shape"),
        ({"data": [{"instruction": "a", "output": "b"}]}, "write the list 'data', which seems to hold the rows"),
        ({"question": "q", "choice0": "a", "choice1": "b", "answer": "0"}, "fit no shape"),
    ],
)
def test_auto_refuses_what_it_cannot_tell(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(rows_of(row))


def test_a_number_that_is_none_counts_as_empty() -> None:
    rows = rows_of({"prompt": 7, "completion": float("nan")})
    assert list(read_records(rows).items) == [Prompt("7", "", "")]


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        read_records(rows_of({"a": "b"}), "alpacca")


def test_an_unknown_column_name_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"data.columns: .*did you mean 'prompt'"):
        read_records(rows_of({"a": "b"}), "prompt-completion", {"promt": "a"})


@pytest.mark.parametrize(
    ("row", "shape", "message"),
    [
        ({"instruction": "i"}, "alpaca", "a.json row 2: expected a column 'output', found 'instruction'"),
        ({"instruction": "i", "outputs": "o"}, "alpaca", "'outputs'; did you mean 'outputs'. add it"),
        ({"instruction": "i", "output": ["o"]}, "alpaca", "a.json row 2: column 'output': expected text, got list"),
        ({"instruction": "i", "output": True}, "alpaca", "expected text, got bool"),
        ({"instruction": "i", "output": float("inf")}, "alpaca", "row 2: column 'output': .*got inf"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row: dict[str, Any], shape: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(rows_of({"instruction": "i", "output": "o"}, row), shape)


NO_ROLES: list[object] = [{"a": 1}, ["user"], None, 7, True, 1.5]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("text", "expected a list of turns, got str"),
        ([{"from": "human", "value": "x"}], "turn 1: expected 'role' and 'content', found 'from', 'value'"),
        *[([{"role": role, "content": "x"}], "turn 1: expected 'role' to be one of system") for role in NO_ROLES],
        *[([{"role": "user", "content": no}], "column 'content': expected text") for no in ({}, [], True)],
        ([{"role": "wizard", "content": "x"}], "turn 1: expected 'role' to be one of system.*got 'wizard'"),
    ],
)
def test_turns_that_do_not_fit_are_named(turns: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(rows_of({"messages": turns}), "messages")
