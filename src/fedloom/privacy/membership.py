"""How well a number told of each row tells rows that were trained on from others.

The attacker has a row, the released model and its base, and asks whether the row was trained on. Its score is how much
lower the row's loss is under the model than under the base: what is easy for everybody is not taken for known.

Source: the loss as the score of Yeom et al. (2018), less that of a reference model as Watson et al. (2022) do, here the
base; the share found at few false alarms as Carlini et al. (2022) ask for. Deviation: no shadow models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FALSE_ALARMS = 0.01
FEWEST_OTHERS = 100
"""Rows without which one false alarm in a hundred cannot be told."""


@dataclass(frozen=True)
class Separation:
    """How far members are apart from others.

    Attributes:
        auc: chance that a member's score is above another row's; 0.5 is a guess.
        low, high: its 95 % interval.
        found_at_few_alarms: share of members above all but one in a hundred of the others; None where these are fewer
            than ``FEWEST_OTHERS``.
    """

    auc: float
    low: float
    high: float
    found_at_few_alarms: float | None
    num_members: int
    num_others: int


def separation(members: NDArray[np.float64], others: NDArray[np.float64]) -> Separation | None:
    """Return how far the scores of members are above those of others; None where there are none of either.

    The interval is that of Hanley and McNeil (1982), for rows that are independent.
    """
    m, n = len(members), len(others)
    if not m or not n:
        return None
    auc = chance_above(members, others)
    one, two = auc / (2.0 - auc), 2.0 * auc**2 / (1.0 + auc)
    spread = auc * (1.0 - auc) + (m - 1) * (one - auc**2) + (n - 1) * (two - auc**2)
    half = 1.96 * math.sqrt(max(spread, 0.0) / (m * n))
    found = None
    if n >= FEWEST_OTHERS:
        found = float((members > np.sort(others)[::-1][math.floor(FALSE_ALARMS * n)]).mean())
    return Separation(auc, max(auc - half, 0.0), min(auc + half, 1.0), found, m, n)


def chance_above(some: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Return the chance that one of ``some`` is above one of ``others``, a draw counting half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, some, "left") + np.searchsorted(ordered, some, "right")
    return float(below.mean() / (2 * len(others)))
