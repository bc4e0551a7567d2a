"""Say how far a figure can be trusted: bootstrap over items, paired differences, Wilson's interval.

Letters: N items, S sufficient statistics of one item, M resamples.

A corpus score is a function of statistics summed over items, so a resample costs one weighted sum and never a second
scoring of any text. Two systems are compared on the same resamples of the same items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedloom import seeding
from fedloom.errors import EvaluationError

Statistics = NDArray[np.float64]
Score = Callable[[Statistics], Statistics]  # (..., S) sums over items -> (...) scores


@dataclass(frozen=True)
class Estimate:
    """A figure, the interval that holds it with probability ``level``, and what both were computed from.

    ``low`` and ``high`` are NaN where the items do not tell.
    """

    value: float
    low: float
    high: float
    n: int
    level: float
    method: str
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.bounded} (n={self.n:,})"

    @property
    def bounded(self) -> str:
        """The figure with its interval, for people."""
        return f"{self.value:.4f} [{_written(self.low)}, {_written(self.high)}]"


@dataclass(frozen=True)
class Difference:
    """How much higher the first system scores than the second on the same items.

    ``low`` and ``high`` are NaN where the items do not tell.
    """

    value: float
    low: float
    high: float
    p_value: float
    n: int
    level: float
    method: str
    seed: int | None = None

    @property
    def is_judged(self) -> bool:
        """Whether n items can tell a difference from chance: their least p, 2^(1−n), is within 1 − level."""
        return 2.0 ** (1 - self.n) <= 1 - self.level

    @property
    def exceeds_noise(self) -> bool:
        """Whether the interval excludes zero, as far as there is one, and p is within 1 − level."""
        is_number = not math.isnan(self.value)
        return is_number and self.p_value <= 1 - self.level and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        verdict = "more than noise" if self.exceeds_noise else "within noise"
        if not self.is_judged:
            verdict = "not judged, too few items"
        if math.isnan(self.value):
            verdict = "no verdict, since a score is not a number"
        bounds = f"[{_written(self.low, '+')}, {_written(self.high, '+')}]"
        return f"{self.value:+.4f} {bounds}, p={self.p_value:.3f}, n={self.n:,}: {verdict}"


@dataclass(frozen=True, eq=False)
class ItemStatistics:
    """What one metric sums over items, (N, S), and the score of such sums: all that a paired comparison needs."""

    statistics_NS: Statistics
    score: Score


def bootstrap(
    statistics_NS: Statistics, score: Score, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> Estimate:
    """Return ``score`` of the summed statistics with its percentile interval over resampled items.

    Raises:
        EvaluationError: there is no item.

    Source: Koehn, "Statistical significance tests for machine translation evaluation", 2004.
    """
    sums_MS = _resampled_sums(statistics_NS, seed, resamples)
    scores_M = score(sums_MS)
    low, high = _bounds(scores_M, float(np.abs(scores_M).max()), level)
    value = float(score(statistics_NS.sum(axis=0)))
    method = f"bootstrap, {resamples} resamples"
    return Estimate(value, low, high, len(statistics_NS), level, method, seed)


def bootstrap_difference(
    first_NS: Statistics,
    second_NS: Statistics,
    score: Score,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Difference:
    """Return the paired difference of two systems' scores over the same items.

    p is two-sided: twice the smaller share of resamples on one side of zero, never below 2 / (resamples + 1), nor below
    2^(1−m), m the items whose statistics differ: the least p of a test that swaps the two systems item by item.

    Raises:
        EvaluationError: the systems were not scored on the same number of items.
    """
    if len(first_NS) != len(second_NS):
        raise EvaluationError(
            f"expected the same items on both sides of a paired comparison, got {len(first_NS)} and {len(second_NS)}: "
            "score both systems on one file"
        )
    first_M, second_M = (score(_resampled_sums(side_NS, seed, resamples)) for side_NS in (first_NS, second_NS))
    differences_M = first_M - second_M
    low, high = _bounds(differences_M, float(np.abs(first_M).max()), level)
    value = float(score(first_NS.sum(axis=0)) - score(second_NS.sum(axis=0)))
    tail = min(np.count_nonzero(differences_M <= 0), np.count_nonzero(differences_M >= 0))
    num_differing = int(np.count_nonzero((first_NS != second_NS).any(axis=1)))
    p_value = min(1.0, max(2 * (int(tail) + 1) / (resamples + 1), 2.0 ** (1 - num_differing)))
    method = f"paired bootstrap, {resamples} resamples"
    return Difference(value, low, high, p_value, len(first_NS), level, method, seed)


def paired_differences(
    first: Mapping[str, ItemStatistics],
    second: Mapping[str, ItemStatistics],
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Difference]:
    """Return by metric how much higher the first system scores than the second, paired over the same items.

    Raises:
        EvaluationError: the systems have other metrics, or were not scored on the same number of items.
    """
    if first.keys() != second.keys():
        raise EvaluationError(
            f"expected the same metrics on both sides of a paired comparison, got {', '.join(first)} and "
            f"{', '.join(second)}: score both systems by the same suite"
        )
    return {
        name: bootstrap_difference(
            one.statistics_NS, second[name].statistics_NS, one.score, seed=seed, resamples=resamples, level=level
        )
        for name, one in first.items()
    }


def bootstrap_mean(values_N: ArrayLike, *, seed: int, resamples: int = 1000, level: float = 0.95) -> Estimate:
    """Return the mean over items with its interval."""
    return bootstrap(ratio_statistics(values_N), ratio, seed=seed, resamples=resamples, level=level)


def ratio_statistics(numerators_N: ArrayLike, denominators_N: ArrayLike = 1.0) -> Statistics:
    """Pair numerators with denominators, (N, 2), for :func:`ratio`; by default every item counts once."""
    columns = np.broadcast_arrays(numerators_N, denominators_N)
    return np.stack(columns, axis=-1).astype(np.float64)


def ratio(sums: Statistics) -> Statistics:
    """Return Σ numerators / Σ denominators from sums (..., 2)."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def wilson(num_successes: int, num_trials: int, *, level: float = 0.95) -> Estimate:
    """Return a proportion with Wilson's score interval.

    centre = (p + z²/2n) / (1 + z²/n), half width = z / (1 + z²/n) · √(p(1−p)/n + z²/4n²)

    Raises:
        EvaluationError: there is no trial.

    Source: Wilson, "Probable inference", 1927.
    """
    if num_trials < 1:
        raise EvaluationError(
            f"expected at least one item for a proportion, got {num_trials}: check the file of questions"
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = num_successes / num_trials
    shrink = 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / shrink
    half = z / shrink * float(np.sqrt(share * (1 - share) / num_trials + (z / (2 * num_trials)) ** 2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), num_trials, level, "Wilson")


def _bounds(scores_M: Statistics, scale: float, level: float) -> tuple[float, float]:
    """Return the percentile interval; NaN where all resamples are alike up to the rounding of figures of ``scale``."""
    if np.ptp(scores_M) <= 1e-12 * scale:
        return math.nan, math.nan
    low, high = np.quantile(scores_M, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _written(bound: float, sign: str = "") -> str:
    return "–" if math.isnan(bound) else f"{bound:{sign}.4f}"


def _resampled_sums(statistics_NS: Statistics, seed: int, resamples: int) -> Statistics:
    """Return statistics summed over ``resamples`` draws of N items with replacement, (M, S)."""
    n = len(statistics_NS)
    if n == 0:
        raise EvaluationError("expected at least one item for an interval, got none: check the file that was scored")
    rng = seeding.stream(seed, "bootstrap", n)
    sums = [np.bincount(rng.integers(n, size=n), minlength=n) @ statistics_NS for _ in range(resamples)]
    return np.stack(sums)
