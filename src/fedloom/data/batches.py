"""The order in which a client reads its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt


def num_batches(num_rows: int, batch_size: int, *, epochs: float) -> int:
    """Return how many batches ``epochs`` passes take: ceil(epochs · ceil(N / B))."""
    _check(num_rows, batch_size)
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"epochs: expected a positive number, got {epochs}")
    # Rounding guards against 0.1 · 30 = 3.0000000000000004.
    return math.ceil(round(epochs * math.ceil(num_rows / batch_size), 9))


def num_rows_read(num_rows: int, batch_size: int, steps: int) -> int:
    """Return how many rows ``steps`` batches of :func:`batches` hold together, each as often as it is read."""
    _check(num_rows, batch_size)
    passes, left = divmod(steps, math.ceil(num_rows / batch_size))
    return passes * num_rows + min(left * batch_size, num_rows)


def batches(
    num_rows: int,
    batch_size: int,
    rng: np.random.Generator,
    *,
    steps: int | None = None,
    epochs: float | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the row indices of each batch, for ``steps`` batches or ``epochs`` passes (exactly one of them).

    Every pass is a fresh permutation of all rows from ``rng``; its last batch holds what is left, which may be fewer
    than ``batch_size`` rows. Steps go on into further passes for as long as needed.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"expected exactly one of steps and epochs, got steps={steps} and epochs={epochs}")
    _check(num_rows, batch_size)
    wanted = steps if steps is not None else num_batches(num_rows, batch_size, epochs=epochs or 0.0)
    return islice(_endless(num_rows, batch_size, rng), wanted)


def _endless(num_rows: int, batch_size: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    while True:
        order = rng.permutation(num_rows)
        for start in range(0, num_rows, batch_size):
            yield order[start : start + batch_size]


def _check(num_rows: int, batch_size: int) -> None:
    if num_rows < 1 or batch_size < 1:
        raise ValueError(f"expected at least one row and a batch size of at least 1, got {num_rows} and {batch_size}")
