"""Where the chance of a private step comes from: the run's seed in a simulation, the operating system at a site.

A guarantee holds only while nobody can work out which units were drawn and which noise was added. A seed that others
know gives both away, so numbers drawn from it are a simulation of privacy and no more.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.seeding import stream


class Draws(Protocol):
    """The draws of one client in one round, step after step."""

    def units(self, num_units: int, rate: float) -> NDArray[np.int64]:
        """Return a Poisson batch: every unit is in it with probability ``rate``, whichever others are."""

    def some(self, num_rows: int, most: int) -> NDArray[np.int64]:
        """Return ``most`` of so many rows in rising order, each choice as likely."""

    def normals(self, size: int) -> NDArray[np.float32]:
        """Return so many independent numbers from N(0, 1)."""


class SeededDraws:
    """Draws from the run's seed: a simulation, which repeats."""

    def __init__(self, seed: int, round: int, client: int) -> None:
        self._batches = stream(seed, "private batches", round, client)
        self._rows = stream(seed, "private rows", round, client)
        self._noise = stream(seed, "private noise", round, client)

    def units(self, num_units: int, rate: float) -> NDArray[np.int64]:
        """Return a Poisson batch."""
        return np.flatnonzero(self._batches.random(num_units) < rate)

    def some(self, num_rows: int, most: int) -> NDArray[np.int64]:
        """Return some of so many rows."""
        return np.sort(self._rows.permutation(num_rows)[:most])

    def normals(self, size: int) -> NDArray[np.float32]:
        """Return numbers from N(0, 1)."""
        return self._noise.standard_normal(size, dtype=np.float32)


class SystemDraws:
    """Draws from the operating system's entropy, which nobody can repeat; normal ones by Box and Muller (1958)."""

    def __init__(self, *_: int) -> None:
        """Take what :class:`SeededDraws` takes, and leave it."""

    def units(self, num_units: int, rate: float) -> NDArray[np.int64]:
        """Return a Poisson batch."""
        return np.flatnonzero(_uniforms(num_units) < rate)

    def some(self, num_rows: int, most: int) -> NDArray[np.int64]:
        """Return some of so many rows."""
        return np.sort(np.argsort(_uniforms(num_rows))[:most])

    def normals(self, size: int) -> NDArray[np.float32]:
        """Return numbers from N(0, 1)."""
        half = -(-size // 2)
        radius, angle = np.sqrt(-2.0 * np.log1p(-_uniforms(half))), 2.0 * math.pi * _uniforms(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].astype(np.float32)


def _uniforms(size: int) -> NDArray[np.float64]:
    """Return numbers from [0, 1), multiples of 2⁻⁵³."""
    words = np.frombuffer(os.urandom(8 * size), np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
