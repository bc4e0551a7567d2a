"""Numbers as whole numbers modulo 2⁶⁴, whose sum is exact in any order: ``x ↦ round(x · 2⁴⁰) mod 2⁶⁴``.

A number may be at most ``2²³ / n`` in size where n are added, so that no sum leaves the signed range: then the sum of
the whole numbers is that of what they stand for, off by at most ``n · 2⁻⁴¹`` from the sum of the numbers themselves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import UpdateError

FRACTION_BITS = 40
WORD_BYTES = 8
Ring = NDArray[np.uint64]
"""Whole numbers modulo 2⁶⁴."""


def largest(num_members: int) -> float:
    """Return the size that every number must stay below where so many are added."""
    return float(2.0 ** (63 - FRACTION_BITS) / num_members)


def to_ring(numbers: NDArray[np.float64], num_members: int) -> Ring:
    """Return numbers in fixed point, of which so many members' are to be added.

    Raises:
        UpdateError: one is not finite, or so large that a sum could overflow.
    """
    limit = largest(num_members)
    size = float(np.abs(numbers).max(initial=0.0))
    if not size < limit:
        raise UpdateError(
            f"expected numbers below {limit:g} in size for a sum of {num_members} in fixed point, got {size:g}; lower "
            "training.learning_rate"
        )
    return np.rint(numbers * 2.0**FRACTION_BITS).astype(np.int64).view(np.uint64)


def from_ring(words: Ring) -> NDArray[np.float64]:
    """Return the numbers that a sum stands for; exact up to the 53 bits of a float."""
    return words.view(np.int64).astype(np.float64) * 2.0**-FRACTION_BITS
