from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data import batches, num_batches
from fedloom.data.batches import num_rows_read
from fedloom.seeding import stream


def _rng(seed: int = 1) -> np.random.Generator:
    return stream(seed, "batches", 0, 0)


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 3))
def test_every_epoch_reads_every_row_once(num_rows: int, batch_size: int, epochs: int) -> None:
    order = list(batches(num_rows, batch_size, _rng(), epochs=epochs))
    per_epoch = len(order) // epochs
    assert len(order) == num_batches(num_rows, batch_size, epochs=epochs)
    for epoch in range(epochs):
        read = np.concatenate(order[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(read.tolist()) == list(range(num_rows))


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 30))
def test_rows_are_counted_as_they_are_read(num_rows: int, batch_size: int, steps: int) -> None:
    read = batches(num_rows, batch_size, _rng(), steps=steps)
    assert num_rows_read(num_rows, batch_size, steps) == sum(map(len, read))


def test_the_last_batch_of_an_epoch_holds_what_is_left() -> None:
    assert [len(batch) for batch in batches(5, 2, _rng(), epochs=2)] == [2, 2, 1, 2, 2, 1]


def test_steps_go_on_into_further_epochs_in_the_same_order() -> None:
    by_steps = [batch.tolist() for batch in batches(5, 2, _rng(), steps=5)]
    by_epochs = [batch.tolist() for batch in batches(5, 2, _rng(), epochs=2)]
    assert by_steps == by_epochs[:5]


def test_epochs_are_shuffled_afresh() -> None:
    first, second = batches(50, 50, _rng(), epochs=2)
    assert first.tolist() != second.tolist()


def test_part_of_an_epoch_is_rounded_up_to_whole_batches() -> None:
    assert [num_batches(60, 2, epochs=e) for e in (0.1, 0.5, 0.51, 1.0)] == [3, 15, 16, 30]


def test_the_generator_decides_the_order() -> None:
    orders = [np.concatenate(list(batches(30, 4, _rng(seed), epochs=1))).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("span", [{}, {"steps": 1, "epochs": 1.0}])
def test_exactly_one_of_steps_and_epochs_is_taken(span: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="exactly one of steps and epochs"):
        batches(3, 1, _rng(), **span)


@pytest.mark.parametrize("epochs", [0.0, -1.0, float("nan"), float("inf")])
def test_epochs_must_be_positive(epochs: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        num_batches(3, 1, epochs=epochs)
