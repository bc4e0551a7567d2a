"""What a whole run computes: operations of training and of evaluation, from the model's shape and the rows' lengths.

Training and evaluation without suites: a row costs a forward and a backward pass where it is trained on, and a forward
pass where it is scored; the base's own gradient costs nothing, since nobody needs it. Operations are those of
:mod:`fedloom.split.cost_model`, on real tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedloom.assembly.split_run import steps_of
from fedloom.config import Settings
from fedloom.split.cost_model import ModelShape, Work, local_step_flops


@dataclass(frozen=True)
class RunCosts:
    """Operations of all rounds and clients, and the rows behind them; ``evaluation_flops`` with those of the base."""

    num_rows_trained: float
    num_rows_scored: float
    training_flops: float
    evaluation_flops: float

    @property
    def evaluation_share(self) -> float:
        """What is evaluated, as a share of what is trained."""
        return self.evaluation_flops / self.training_flops


def run_costs(settings: Settings, shape: ModelShape, row: Work, num_rows: int, num_held_out: int) -> RunCosts:
    """Return what a recipe of ``num_rows`` training rows and ``num_held_out`` others computes.

    ``row`` is the mean row: its tokens, and those supervised. Clients are taken to have equally many rows, and ranks
    their mean.
    """
    rank = sum(settings.client_ranks) / len(settings.client_ranks)
    trained = _rows_trained(settings, num_rows)
    scored = float(num_held_out * (1 + _evaluations(settings, num_rows)))  # the base is scored once before
    tokens, learned = row.tokens_per_step, row.loss_tokens_per_step
    forward = tokens * shape.forward_flops(0, shape.num_blocks, row.tokens_per_sample, rank)
    scoring = forward + 2.0 * shape.head_parameters * learned
    return RunCosts(trained, scored, trained * local_step_flops(shape, rank, row), scored * scoring)


def _rows_trained(settings: Settings, num_rows: int) -> float:
    """Return the rows that all clients of all rounds train on, as often as they do."""
    training, federation = settings.training, settings.federation
    clients = settings.federation.num_clients if settings.traits.is_cut else settings.cohort_size
    if training.local_steps is not None:
        of_client = float(training.local_steps * training.batch_size)
    else:
        assert training.local_epochs is not None
        of_client = training.local_epochs * num_rows / federation.num_clients
    return federation.num_rounds * clients * of_client


def _evaluations(settings: Settings, num_rows: int) -> int:
    """Return how often a run evaluates its state: every so many rounds, of a cut run aggregations, and at the end."""
    rounds, every = settings.federation.num_rounds, settings.evaluation.every
    if settings.traits.is_cut:
        of_client = num_rows // settings.federation.num_clients
        steps = steps_of(settings, [of_client] * settings.federation.num_clients)
        rounds = math.ceil(steps / settings.split.aggregate_every)
    return 1 if every == 0 else math.ceil(rounds / every)
