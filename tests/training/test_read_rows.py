"""The rows that a client is said to have read are those that its round read, private or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.private_rows import RowPrivacy
from fedloom.training.read_rows import rows_read

PLAIN = LocalTraining(learning_rate=1e-2, batch_size=2, steps=2)
FEW = replace(PLAIN, privacy=RowPrivacy(1.0, 0.5, 2))


class Watched(TokenSet):
    """Rows that remember which of them were looked at."""

    seen: set[int]

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        self.seen.add(index)
        return super().row(index)


@pytest.mark.parametrize(
    "training",
    [PLAIN, replace(PLAIN, steps=None, epochs=0.5), replace(PLAIN, privacy=RowPrivacy(1.0, 0.5)), FEW],
    ids=["steps", "epochs", "private", "private, some rows of a unit"],
)
def test_they_are_those_that_the_round_looks_at(
    training: LocalTraining, llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    plain = rows_of_lengths([9, 3, 17, 5, 2, 8, 4, 6])
    if training is FEW:
        plain = replace(plain, units=np.arange(8) // 3)
    rows = Watched(plain.input_ids, plain.supervised, plain.starts, plain.units)
    object.__setattr__(rows, "seen", set())
    task = ClientTask(7, rows, 4, 2.0, fresh_adapter(llama_lora.shapes, 4, 0, 1))
    train_cohort(llama_lora, [task], training, seed=3, round=2)
    read = rows_read(plain, training, seed=3, round=2, client=7)
    assert 0 < len(read) < len(plain)
    assert sorted(rows.seen) == read.tolist()
    assert read.tolist() != rows_read(plain, training, seed=4, round=2, client=7).tolist()
