"""Who is drawn for a round, in one process and of the sites that are there."""

from __future__ import annotations

from collections import Counter

import pytest

from fedloom.assembly.round_plan import cohorts
from fedloom.config import Settings

PRESENT, NUM_ROWS = [1, 3, 4, 6], {0: 900, 1: 10, 3: 10, 4: 10, 6: 970}
ROUNDS = 200


@pytest.mark.parametrize("sampling", ["uniform", "rows"])
def test_clients_are_drawn_from_those_present_as_the_sampling_says(sampling: str) -> None:
    settings = Settings.model_validate({"federation": {"num_clients": 7, "sampling": sampling}})
    sample = cohorts(settings, 2, PRESENT, NUM_ROWS)
    drawn = [sample(round) for round in range(1, ROUNDS + 1)]
    assert all(len(cohort) == len(set(cohort)) == 2 for cohort in drawn)
    times = Counter(client for cohort in drawn for client in cohort)
    assert set(times) == set(PRESENT)
    assert (times[6] == ROUNDS) == (sampling == "rows")
    assert drawn == [sample(round) for round in range(1, ROUNDS + 1)]


def test_more_than_are_present_are_all_of_them() -> None:
    settings = Settings.model_validate({"federation": {"num_clients": 7, "sampling": "rows"}})
    assert cohorts(settings, 5, PRESENT, NUM_ROWS)(1) == PRESENT
