"""Which of its rows a client read in a round: the draws of :mod:`fedloom.training.cohort_round`, made again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedloom.data.batches import batches
from fedloom.data.tokens import TokenSet
from fedloom.privacy.draws import Draws, SeededDraws
from fedloom.seeding import stream
from fedloom.training.cohort_round import LocalTraining
from fedloom.training.private_rows import drawn_units, private_steps_of


def rows_read(
    rows: TokenSet,
    settings: LocalTraining,
    *,
    seed: int,
    round: int,
    client: int,
    draws: Callable[[int, int, int], Draws] = SeededDraws,
) -> NDArray[np.int64]:
    """Return the positions of the rows that a client read in a round, each once, in rising order.

    Rounds count as in ``train_cohort``. Of private steps whose draws are not the seed's nobody can say it again.
    """
    steps, epochs, size = settings.steps, settings.epochs, settings.batch_size
    if settings.privacy is None:
        rng = stream(seed, "batches", round - settings.start_rounds, client)
        read = list(batches(len(rows), size, rng, steps=steps, epochs=epochs))
    else:
        units, drawn = rows.by_unit(), draws(seed, round, client)
        count, most = private_steps_of(len(units), size, steps, epochs), settings.privacy.rows_per_unit
        read = [unit for _ in range(count) for unit in drawn_units(units, size, drawn, most)]
    return np.unique(np.concatenate([*read, np.zeros(0, np.int64)])).astype(np.int64)
