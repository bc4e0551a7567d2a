"""Canaries: drawn by the seed among ordinary tokens, owned by whom they were planted with, behind all other rows."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.data.canaries import NUM_TOKENS, Planting, plant, sequences
from fedloom.data.partition import Partition
from fedloom.data.tokenizer import byte_tokenizer
from fedloom.data.tokens import TokenSet
from fedloom.errors import DataError

TOKENIZER = byte_tokenizer()
ROWS = TokenSet.from_rows(([5, 6, 7 + k], [False, True, True]) for k in range(5))
OWNERS = Partition.from_owners(np.array([0, 1, 0, 1, 1]), ["a", "b"])


def test_a_canary_is_as_often_among_its_clients_rows_as_asked_and_behind_all_others() -> None:
    tokens, partition, canaries = plant(ROWS, OWNERS, Planting(2, ("b",), 3), TOKENIZER, 1)
    assert [canary.client for canary in canaries] == ["b", "b"]
    assert len(tokens) == partition.num_rows == 5 + 2 * 3
    assert partition.rows_of(0).tolist() == OWNERS.rows_of(0).tolist()
    held = tokens.select(partition.rows_of(1)[3:])
    assert [tuple(held.row(k)[0].tolist()) for k in range(6)] == [one.ids for one in canaries for _ in range(3)]
    assert tokens.select(range(5)).sha256() == ROWS.sha256()
    assert len(tokens.by_unit()) == 11  # each copy is a row of its own


def test_nothing_is_planted_unless_asked_and_each_client_gets_its_own_where_none_is_named() -> None:
    assert plant(ROWS, OWNERS, Planting(), TOKENIZER, 1) == (ROWS, OWNERS, ())
    canaries = plant(ROWS, OWNERS, Planting(2), TOKENIZER, 1)[2]
    assert len({canary.ids for canary in canaries}) == 4
    assert canaries == plant(ROWS, OWNERS, Planting(2), TOKENIZER, 1)[2]
    assert canaries != plant(ROWS, OWNERS, Planting(2), TOKENIZER, 2)[2]


def test_a_client_that_is_none_is_named() -> None:
    with pytest.raises(DataError, match=r"data.canary_clients: expected clients of this run \(a, b\), got 'c'"):
        plant(ROWS, OWNERS, Planting(1, ("a", "c")), TOKENIZER, 1)


def test_tokens_are_ordinary_ones_and_all_of_them_are_drawn() -> None:
    drawn = sequences(TOKENIZER, 2000, 1, "some")
    begin = 0 if TOKENIZER.bos_token_id is None else 1
    assert drawn.shape == (2000, NUM_TOKENS + begin)
    ordinary = set(range(256)) - set(TOKENIZER.all_special_ids)
    assert set(drawn[:, begin:].flatten().tolist()) == ordinary
