"""What a run computes: by hand on a small recipe, and the shipped recipes' evaluation beside their training."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedloom import config, recipes
from fedloom.config import Settings, checks
from fedloom.preview.run_costs import run_costs
from fedloom.split.cost_model import ModelShape, Work

SHAPE = ModelShape(10, (100, 100), (20, 20), 50, 70)
ROW = Work(tokens_per_step=8, loss_tokens_per_step=4, tokens_per_sample=8)
ROWS = {
    "default": (3_800, 200),
    "e2e-dirichlet": (41_061, 1000),
    "fedit-dolly": (14_931, 80),
    "fedit-natural": (9_500, 500),
    "flora-hetero-dolly": (14_931, 80),
    "flora-homo-alpaca": (51_802, 200),
    "splitlora-e2e": (41_061, 1000),
    "splitlora-e2e-medium": (41_061, 1000),
}
"""Rows to train on and held out of the published data sets; of Natural Instructions only their proportion counts."""
MOST_OF_TRAINING = 0.1


def test_two_rounds_by_hand(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(method__ranks=2)
    found = run_costs(settings, SHAPE, ROW, num_rows=42, num_held_out=6)
    forward = 8 * 2 * (2 * 100 + 2 * 8 * 10 + 2 * 2 * 20)
    assert found.num_rows_trained == 2 * 3 * 2 * 4  # rounds, clients, steps, rows of a step
    assert found.num_rows_scored == 6 * 3  # the base, and both rounds
    assert found.training_flops == 48 * (2 * forward + 8 * 2 * 2 * 2 * 20 + 4 * 70 * 4)
    assert found.evaluation_flops == 18 * (forward + 2 * 70 * 4)
    rarely = run_costs(settings_for(method__ranks=2, evaluation__every=0), SHAPE, ROW, 42, 6)
    assert rarely.num_rows_scored == 6 * 2


def test_epochs_count_the_rows_of_the_clients_that_take_part(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(training__local_epochs=1.5, training__local_steps=None, federation__clients_per_round=2)
    assert run_costs(settings, SHAPE, ROW, num_rows=42, num_held_out=0).num_rows_trained == 2 * 2 * 1.5 * 14


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_evaluates_for_at_most_a_tenth_of_what_it_trains(name: str) -> None:
    settings = config.resolve(config.parse(recipes.read(name), name), name, (), also=[checks.problems])
    assert not settings.evaluation.suites
    assert run_costs(settings, SHAPE, ROW, *ROWS[name]).evaluation_share <= MOST_OF_TRAINING


def test_every_recipe_but_the_demo_is_among_them() -> None:
    assert {*ROWS, "demo"} == set(recipes.names())
