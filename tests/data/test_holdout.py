from __future__ import annotations

import numpy as np
import pytest

from fedloom.data import hold_out, hold_out_by_category
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
