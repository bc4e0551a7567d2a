"""Exposure: the likeliest of a sample has all its bits, an unplanted sequence 1.44 on average, a tie none to spare."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.privacy.exposure import UNPLANTED_BITS, exposure_bits, most_bits


def test_exposure_is_the_log_of_the_sample_less_that_of_the_rank() -> None:
    candidates = np.arange(1.0, 8.0)
    assert exposure_bits(0.0, candidates) == most_bits(7) == 3.0
    assert exposure_bits(1.5, candidates) == 2.0
    assert exposure_bits(9.0, candidates) == 0.0
    assert exposure_bits(1.0, candidates) == 2.0  # a tie counts against it


def test_a_sequence_that_was_never_planted_has_the_bits_that_are_expected_of_it() -> None:
    rng = np.random.default_rng(0)
    found = [exposure_bits(rng.normal(), rng.normal(size=255)) for _ in range(4000)]
    assert np.mean(found) == pytest.approx(UNPLANTED_BITS, abs=0.1)
