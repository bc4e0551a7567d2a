from __future__ import annotations

import math

import numpy as np
import pytest

from fedloom.errors import EvaluationError
from fedloom.evaluation.intervals import (
    ItemStatistics,
    bootstrap,
    bootstrap_difference,
    bootstrap_mean,
    paired_differences,
    ratio,
    ratio_statistics,
    wilson,
)


def test_wilson_interval_equals_the_textbook_one() -> None:
    estimate = wilson(10, 20)  # Newcombe 1998: 0.2993 to 0.7007
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2993, 0.7007)


def test_wilson_interval_of_no_success_starts_at_zero_and_is_not_empty() -> None:
    estimate = wilson(0, 10)
    assert estimate.low == pytest.approx(0.0, abs=1e-12)
    assert 0.2 < estimate.high < 0.35


def test_bootstrap_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.linspace(-1, 1, 400)
    estimate = bootstrap_mean(values, seed=3, resamples=2000)
    standard_error = values.std() / np.sqrt(len(values))
    assert estimate.value == pytest.approx(0.0, abs=1e-12)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    estimates = [bootstrap_mean(rng.normal(size=60), seed=i, resamples=300) for i in range(150)]
    covered = np.mean([estimate.low <= 0.0 <= estimate.high for estimate in estimates])
    assert 0.88 <= covered <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.arange(30.0)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1).low != bootstrap_mean(values, seed=2).low


def test_paired_difference_sees_through_noise_that_items_share() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    difficulty = rng.normal(scale=10, size=200)
    better = ratio_statistics(difficulty + 0.5 + rng.normal(scale=0.1, size=200))
    worse = ratio_statistics(difficulty)
    difference = bootstrap_difference(better, worse, ratio, seed=0)
    assert difference.exceeds_noise
    assert difference.value == pytest.approx(0.5, abs=0.05)
    assert difference.p_value < 0.01


def test_a_system_against_itself_is_within_noise() -> None:
    same = ratio_statistics(np.arange(20.0))
    difference = bootstrap_difference(same, same, ratio, seed=0)
    assert (difference.value, difference.p_value) == (0.0, 1.0)
    assert not difference.exceeds_noise


@pytest.mark.parametrize("values", [[3.2], [0.1] * 7])
def test_items_that_do_not_vary_bound_nothing(values: list[float]) -> None:
    estimate = bootstrap_mean(values, seed=0)
    assert estimate.value == pytest.approx(values[0])
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)
    assert str(estimate) == f"{values[0]:.4f} [–, –] (n={len(values)})"


@pytest.mark.parametrize(("n", "p_value"), [(1, 1.0), (2, 0.5), (5, 2**-4)])
def test_a_few_items_are_not_judged_however_clear_they_are(n: int, p_value: float) -> None:
    one, other = ratio_statistics(10.0 + np.arange(n)), ratio_statistics(np.zeros(n))
    difference = bootstrap_difference(one, other, ratio, seed=0)
    assert difference.p_value == p_value
    assert not difference.is_judged
    assert not difference.exceeds_noise
    assert str(difference).endswith(f"p={p_value:.3f}, n={n}: not judged, too few items")


@pytest.mark.parametrize(("num_differing", "exceeds"), [(5, False), (6, True)])
def test_one_sided_differences_count_as_chance_would_bring_them(num_differing: int, exceeds: bool) -> None:
    one, other = np.zeros(6), np.zeros(6)
    one[:num_differing] = 1.0
    difference = bootstrap_difference(ratio_statistics(one), ratio_statistics(other), ratio, seed=0)
    assert difference.p_value == 2.0 ** (1 - num_differing)
    assert difference.is_judged
    assert difference.exceeds_noise is exceeds


def test_ratio_weighs_items_by_their_denominator() -> None:
    assert bootstrap(ratio_statistics([1.0, 9.0], [1.0, 3.0]), ratio, seed=0).value == 2.5


def test_each_metric_is_compared_by_its_own_score() -> None:
    first = {"mean": ItemStatistics(ratio_statistics([3.0, 5.0]), ratio)}
    first["sum"] = ItemStatistics(ratio_statistics([3.0, 5.0]), lambda sums: sums[..., 0])
    second = {name: ItemStatistics(ratio_statistics([1.0, 1.0]), one.score) for name, one in first.items()}
    differences = paired_differences(first, second, seed=0, resamples=20)
    assert {name: found.value for name, found in differences.items()} == {"mean": 3.0, "sum": 6.0}


def test_comparing_different_metrics_is_refused() -> None:
    one = ItemStatistics(ratio_statistics([1.0]), ratio)
    with pytest.raises(
        EvaluationError, match="same metrics on both sides of a paired comparison, got BLEU and BLEU, METEOR"
    ):
        paired_differences({"BLEU": one}, {"BLEU": one, "METEOR": one}, seed=0)


def test_comparing_different_numbers_of_items_is_refused() -> None:
    with pytest.raises(EvaluationError, match="got 3 and 2"):
        bootstrap_difference(ratio_statistics(np.ones(3)), ratio_statistics(np.ones(2)), ratio, seed=0)


@pytest.mark.parametrize("compute", [lambda: wilson(0, 0), lambda: bootstrap_mean([], seed=0)])
def test_an_interval_over_nothing_is_refused(compute: object) -> None:
    with pytest.raises(EvaluationError, match="at least one item"):
        compute()  # type: ignore[operator]


def test_a_difference_that_is_not_a_number_is_not_called_noise() -> None:
    diverged = bootstrap_difference(ratio_statistics([1.0, math.nan]), ratio_statistics([1.0, 2.0]), ratio, seed=1)
    assert str(diverged).endswith("no verdict, since a score is not a number")
