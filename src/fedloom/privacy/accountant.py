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

_INTERVAL = 1e-4
"""Discretisation of the privacy loss; dp-accounting's own default. What it rounds, it rounds up."""


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
def _loss_of(step: PrivateStep) -> Any:
    """Return the privacy loss distribution of one step."""
    dp = _dp_accounting()
    return dp.pld.privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=step.noise_multiplier,
        value_discretization_interval=_INTERVAL,
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
