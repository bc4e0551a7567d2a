from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data import TokenSet

ROWS = st.lists(st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=5), max_size=8)


def _set(rows: list[list[tuple[int, bool]]]) -> TokenSet:
    return TokenSet.from_rows(([i for i, _ in row], [s for _, s in row]) for row in rows)


def _rows(tokens: TokenSet) -> list[list[tuple[int, bool]]]:
    return [
        list(zip(ids.tolist(), learned.tolist(), strict=True)) for ids, learned in map(tokens.row, range(len(tokens)))
    ]


@given(ROWS)
def test_rows_come_back_as_given(rows: list[list[tuple[int, bool]]]) -> None:
    tokens = _set(rows)
    assert _rows(tokens) == rows
    assert tokens.lengths.tolist() == list(map(len, rows))
    assert (tokens.num_tokens, tokens.num_loss_tokens) == (sum(map(len, rows)), sum(s for row in rows for _, s in row))


@given(ROWS, st.data())
def test_select_takes_rows_in_the_order_asked_for(rows: list[list[tuple[int, bool]]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))))) if rows else []
    assert _rows(_set(rows).select(chosen)) == [rows[i] for i in chosen]


@given(ROWS, ROWS)
def test_concatenate_joins_rows(left: list[list[tuple[int, bool]]], right: list[list[tuple[int, bool]]]) -> None:
    assert _rows(TokenSet.concatenate([_set(left), _set(right)])) == left + right


@given(ROWS, ROWS)
def test_hashes_agree_exactly_when_the_content_does(
    left: list[list[tuple[int, bool]]], right: list[list[tuple[int, bool]]]
) -> None:
    assert (_set(left).sha256() == _set(right).sha256()) == (left == right)


def test_the_arrays_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        _set([[(1, True)]]).input_ids[0] = 2


def test_a_row_outside_is_refused() -> None:
    tokens = _set([[(1, True)]])
    for index in (-1, 1):
        with pytest.raises(IndexError):
            tokens.row(index)
        with pytest.raises(IndexError):
            tokens.select([index])


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="starts"):
        TokenSet(np.zeros(2, np.int32), np.zeros(2, np.bool_), np.array([0, 1]))
