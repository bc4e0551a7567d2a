from __future__ import annotations

import numpy as np
import pytest

from fedloom.data import hold_out, hold_out_by_category
from fedloom.data.holdout import hold_out_of_owners, hold_out_units
from fedloom.errors import DataError
from fedloom.seeding import stream


@pytest.mark.parametrize(("amount", "count"), [(3, 3), (0.25, 5)])
def test_the_asked_amount_is_held_and_the_rest_kept(amount: float, count: int) -> None:
    split = hold_out(20, amount, stream(1, "hold-out"))
    assert len(split.held) == count
    assert sorted([*split.kept.tolist(), *split.held.tolist()]) == list(range(20))


def test_each_category_gives_its_rows() -> None:
    labels = np.array(list("aaaabbbbbbbb"))
    split = hold_out_by_category(labels.tolist(), 2, stream(1, "hold-out"))
    assert sorted(labels[split.held].tolist()) == ["a", "a", "b", "b"]
    split = hold_out_by_category(labels.tolist(), 0.5, stream(1, "hold-out"))
    assert sorted(labels[split.held].tolist()) == list("aabbbb")


@pytest.mark.parametrize("amount", [0, 20, 21, -1, 0.0, 1.0, 1.5, 0.001])
def test_an_amount_that_leaves_nothing_on_one_side_is_refused(amount: float) -> None:
    with pytest.raises(DataError, match="hold-out of"):
        hold_out(20, amount, stream(1, "hold-out"))


def test_a_category_that_is_too_small_is_named() -> None:
    with pytest.raises(DataError, match="category 'b'"):
        hold_out_by_category("aaaab", 1, stream(1, "hold-out"))


@pytest.mark.parametrize(("amount", "count"), [(3, 3), (0.25, 3)])
def test_every_owner_keeps_a_row_whatever_is_drawn(amount: float, count: int) -> None:
    owners = np.array([0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    for seed in range(20):
        split = hold_out_of_owners(owners, amount, stream(seed, "validation"))
        assert len(split.held) == count
        assert sorted([*split.kept.tolist(), *split.held.tolist()]) == list(range(12))
        assert set(owners[split.kept]) == {0, 1, 2}


def test_owners_with_no_row_to_spare_are_refused() -> None:
    with pytest.raises(DataError, match=r"one row to be left to each of the 3 clients, got 4 rows in all; lower it"):
        hold_out_of_owners(np.array([0, 1, 2, 2]), 2, stream(1, "validation"))
    with pytest.raises(DataError, match=r"hold-out of 0\.1 from the rows to train on"):
        hold_out_of_owners(np.array([0, 1, 2, 2]), 0.1, stream(1, "validation"))


def test_units_are_held_out_whole_until_there_are_as_many_rows_and_one_by_one_as_rows_are() -> None:
    sizes = np.array([1, 5, 2, 2, 7, 3])
    for seed in range(20):
        held = hold_out_units(sizes, 6, stream(seed, "hold-out")).held
        assert 6 <= sizes[held].sum() < 6 + 7
    assert len(hold_out_units(sizes, 0.5, stream(1, "hold-out")).held) == 3
    for amount in (3, 0.25):
        alone = hold_out_units(np.ones(20, np.int64), amount, stream(1, "hold-out"))
        assert np.array_equal(alone.held, hold_out(20, amount, stream(1, "hold-out")).held)
    with pytest.raises(DataError, match="expected one of its 2 units to be left, got none"):
        hold_out_units(np.array([9, 9]), 17, stream(1, "hold-out"))
