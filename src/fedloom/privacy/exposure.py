"""How far a model gives a planted sequence away: its place among sequences that could have been planted instead.

    exposure = log2 |candidates| − log2 (rank of the planted one among them, by its loss)

All candidates are too many to score, so that a sample stands for them, with the planted one added: then it is at most
the log2 of the sample's size, and of a sequence that was never planted 1.44 bits on average.

Source: Carlini et al. (2019), The Secret Sharer, section 4; by sampling as in its section 4.3.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

UNPLANTED_BITS = 1.0 / math.log(2.0)
"""What a sequence has on average that was never planted, where the candidates are many."""


def exposure_bits(planted: float, candidates: NDArray[np.float64]) -> float:
    """Return the exposure of a sequence of the loss ``planted`` among a sample's losses; ties count against it."""
    rank = 1 + int((candidates <= planted).sum())
    return most_bits(len(candidates)) - math.log2(rank)


def most_bits(num_candidates: int) -> float:
    """Return the exposure of a sequence of lower loss than every one of the sample."""
    return math.log2(num_candidates + 1)
