"""Membership: rows apart give 1, rows alike give a half, and few false alarms are counted where there can be few."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.privacy.membership import FEWEST_OTHERS, chance_above, separation


def test_the_auc_is_the_share_of_pairs_and_a_draw_counts_half() -> None:
    some, others = np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0])
    pairs = [(s > o) + (s == o) / 2 for s in some for o in others]
    assert chance_above(some, others) == pytest.approx(sum(pairs) / len(pairs))


def test_rows_that_are_apart_are_all_found_and_the_interval_has_no_width() -> None:
    found = separation(np.arange(200.0, 300.0), np.arange(200.0))
    assert found is not None
    assert (found.auc, found.low, found.high, found.found_at_few_alarms) == (1.0, 1.0, 1.0, 1.0)


def test_rows_that_are_alike_are_at_a_half_within_the_interval_and_few_are_found() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = separation(rng.normal(size=150), rng.normal(size=150))
        assert found is not None
        inside += found.low <= 0.5 <= found.high
    assert 180 <= inside <= 198
    assert found.found_at_few_alarms is not None
    assert found.found_at_few_alarms < 0.1


def test_few_false_alarms_are_one_in_a_hundred_and_need_a_hundred_others() -> None:
    others = np.arange(FEWEST_OTHERS, dtype=float)
    found = separation(np.array([97.5, 98.5, 99.5]), others)
    assert found is not None
    assert found.found_at_few_alarms == pytest.approx(2 / 3)  # 98.5 is above all but one
    fewer = separation(np.array([97.5]), others[:-1])
    assert fewer is not None
    assert fewer.found_at_few_alarms is None


def test_nothing_is_told_of_no_rows() -> None:
    assert separation(np.zeros(0), np.ones(3)) is None
    assert separation(np.ones(3), np.zeros(0)) is None
