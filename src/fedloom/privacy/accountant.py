"""What private steps cost: ε at a δ, by the privacy loss distributions of Google's dp-accounting.

A step takes a Poisson batch of rate q and releases a sum that no unit moves by more than the clip, with noise of z
times the clip: the Poisson-sampled Gaussian mechanism. Neighbours differ by one unit more or less. Costs of steps add
up by convolution, in any order, so steps of one kind are counted and composed at once.

Source: Koskela et al. (2020); Doroshenko et al., Connect the Dots (2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedloom.errors import MissingExtraError

_INTERVAL, _COARSE = 1e-4, 1e-3
"""Discretisation of the privacy loss: dp-accounting's own default, and one ten times cheaper, for plans. What either
rounds, it rounds up."""
_MOST_NOISE = 1e4


@dataclass(frozen=True, order=True)
class PrivateStep:
    """One step: the rate at which it draws units, and its noise in multiples of the clip."""

    rate: float
    noise_multiplier: float


def check_accountant() -> None:
    """Check that the accountant is installed.

    Raises:
        MissingExtraError: it is not.
    """
    _dp_accounting()


def epsilon(steps: Mapping[PrivateStep, int], delta: float) -> float:
    """Return ε at δ of all these steps together, given as how many of each kind; infinite where there is no noise.

    Raises:
        MissingExtraError: dp-accounting is not installed.
    """
    taken = tuple(sorted((step, count) for step, count in steps.items() if count))
    return _epsilon(taken, delta) if taken else 0.0


def epsilon_at_most(step: PrivateStep, count: int, delta: float) -> float:
    """Return a little more than ε at δ of so many equal steps: about a thousandth too much, in a tenth of the time.

    Raises:
        MissingExtraError: dp-accounting is not installed.
    """
    if count == 0:
        return 0.0
    return float(_loss_of(step, _COARSE).self_compose(count).get_epsilon_for_delta(delta))


def noise_multiplier_for(rate: float, count: int, delta: float, max_epsilon: float) -> float:
    """Return the least noise, in hundredths of the clip, with which so many steps cost at most ``max_epsilon``.

    Raises:
        MissingExtraError: dp-accounting is not installed.
    """
    low, high = 0.0, 1.0
    while epsilon_at_most(PrivateStep(rate, high), count, delta) > max_epsilon and high < _MOST_NOISE:
        low, high = high, 2.0 * high
    while high - low > 0.01 + 1e-9:
        middle = round((low + high) / 2, 2)
        enough = epsilon_at_most(PrivateStep(rate, middle), count, delta) <= max_epsilon
        low, high = (low, middle) if enough else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _epsilon(taken: tuple[tuple[PrivateStep, int], ...], delta: float) -> float:
    if any(step.noise_multiplier == 0.0 for step, _ in taken):
        return math.inf
    whole: Any = None
    for step, count in taken:
        part = _loss_of(step).self_compose(count)
        whole = part if whole is None else whole.compose(part)
    return float(whole.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _loss_of(step: PrivateStep, interval: float = _INTERVAL) -> Any:
    """Return the privacy loss distribution of one step."""
    dp = _dp_accounting()
    return dp.pld.privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=step.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=step.rate,
        neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _dp_accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
    except ImportError as error:
        raise MissingExtraError("privacy", "privacy.unit") from error
    return dp_accounting
