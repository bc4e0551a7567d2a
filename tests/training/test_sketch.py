"""A sketch is Ωᵀ times the gradient of the weight, as plain autograd has it, of a few rows at the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import Draw
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import rank_in
from fedloom.models.families import resolve_targets
from fedloom.training.cohort_round import ClientResult, ClientTask, train_cohort
from fedloom.training.local_training import SKETCH_ROWS, LocalTraining

TRAINING = LocalTraining(1e-2, batch_size=1, steps=5, dropout=0.3, warmup_steps=9, schedule_span="run", start_rounds=1)
LENGTHS = [9, 3, 17, 5]
RANK = 12


def dense_gradients(model: Any, lora: LoRAModel, rows: TokenSet) -> dict[str, torch.Tensor]:
    """Return the gradient (O, I) of the mean loss over the supervised tokens of all rows, of every target's weight."""
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in lora.shapes}
    sums, count = [], 0
    for index in range(len(rows)):
        ids, supervised = (torch.tensor(part.tolist()) for part in rows.row(index))
        chosen = supervised[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        sums.append(cross_entropy(logits[chosen], ids[1:][chosen], reduction="sum"))
        count += int(chosen.sum())
    (torch.stack(sums).sum() / count).backward()
    grads = {name: weight.grad for name, weight in weights.items()}
    return {name: grad.T if lora.uses_conv1d else grad for name, grad in grads.items()}


def sketched(lora: LoRAModel, rows: TokenSet, training: LocalTraining = TRAINING) -> ClientResult:
    start = Draw(("sketch",), RANK, random="b").adapter(lora.shapes, RANK, 1)
    start = start.to(torch.float64)
    task = ClientTask(3, rows, RANK, 0.7, start, trains=frozenset("a"), measures_gradient=True, sketches=True)
    (found,) = train_cohort(lora, [task], training, seed=1, round=1)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_sketch_is_the_drawn_columns_times_the_dense_gradient(
    kind: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = tiny(kind), rows_of_lengths(LENGTHS)
    lora = LoRAModel(model, resolve_targets(model))
    found = sketched(lora, rows)
    assert found.gradient is not None
    assert (found.stats.num_steps, found.stats.num_rows, found.stats.num_tokens) == (0, 4, sum(LENGTHS))
    dense = dense_gradients(tiny(kind), lora, rows)
    for name, (num_out, num_in) in lora.shapes.items():
        omega = Draw(("sketch",), RANK, random="b").adapter(lora.shapes, RANK, 1)[name].b_OR.double()
        assert omega.shape == (num_out, rank_in((num_out, num_in), RANK))
        assert 0.8 < float(omega.std()) < 1.2
        expected = omega.T @ dense[name]
        assert float((found.gradient[name].a_RI - expected).norm()) <= 1e-9 * float(expected.norm()) > 0.0
        assert not found.gradient[name].b_OR.any()


def test_a_sketch_reads_four_rows_and_is_the_same_in_any_passes(
    llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    rows = rows_of_lengths([5] * 11)
    whole, parts = (sketched(llama_lora, rows, replace(TRAINING, token_budget=budget)) for budget in (99, 1))
    assert whole.num_examples_seen == parts.num_examples_seen == SKETCH_ROWS
    assert whole.gradient is not None
    assert parts.gradient is not None
    for name, pair in whole.gradient.items():
        torch.testing.assert_close(pair.a_RI, parts.gradient[name].a_RI)


def test_a_sketch_moves_neither_the_draws_nor_the_schedule_of_the_rounds_after_it(
    llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    start = Draw(("any",)).adapter(llama_lora.shapes, 2, 1).to(torch.float64)
    task = ClientTask(3, rows_of_lengths([9, 3, 17, 5, 2, 8]), 2, 0.7, start)
    training = replace(TRAINING, total_rounds=3, schedule="linear", warmup_steps=3)
    rates: list[list[float]] = []
    ended = []
    for settings, round in ((replace(training, start_rounds=0), 2), (training, 3)):
        rates.append([])
        (result,) = train_cohort(
            llama_lora, [task], settings, seed=1, round=round, on_step=lambda s: rates[-1].append(s.learning_rate)
        )
        ended.append(result.adapter)
    assert rates[0] == rates[1]
    assert all(torch.equal(pair.b_OR, ended[1][name].b_OR) for name, pair in ended[0].items())
