"""Private steps: what is summed is clipped unit by unit, what hides a unit is noise, and nothing else is told."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.data.batches import batches
from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.models.families import resolve_targets
from fedloom.privacy.clipping import add_clipped, add_noise
from fedloom.privacy.draws import SeededDraws, SystemDraws
from fedloom.seeding import stream
from fedloom.training.client_passes import Passes
from fedloom.training.cohort_round import ClientResult, ClientTask, LocalTraining, train_cohort
from fedloom.training.private_rows import RowPrivacy

LENGTHS = [9, 3, 17, 5, 2, 8]
SCALE = 2.0
CLIP = 4.0
PLAIN = LocalTraining(learning_rate=1e-2, batch_size=6, steps=3)
CLIPPED = replace(PLAIN, privacy=RowPrivacy(CLIP, 0.0))
UNCLIPPED = replace(PLAIN, privacy=RowPrivacy(math.inf, 0.0))


class Given:
    """Draws that are given: these units in every step, or the next of several lists, and no noise."""

    def __init__(self, *steps: Sequence[int]) -> None:
        self.steps = [np.array(step, np.int64) for step in steps]

    def units(self, num_units: int, rate: float) -> Any:
        return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]

    def normals(self, size: int) -> Any:
        raise AssertionError("without noise nothing is drawn")


@pytest.fixture
def task(llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]) -> ClientTask:
    start = fresh_adapter(llama_lora.shapes, 4, 0, 1)
    return ClientTask(7, rows_of_lengths(LENGTHS), 4, SCALE, moved(start))


def moved(adapter: Adapter) -> Adapter:
    """Return an adapter whose B is not zero, so that A has a gradient too."""
    rng = torch.Generator().manual_seed(3)
    factors = {key: t + 0.1 * torch.randn(t.shape, generator=rng) for key, t in adapter.as_tensors().items()}
    return Adapter.from_tensors(factors)


def train(lora: LoRAModel, task: ClientTask, settings: LocalTraining, **changes: Any) -> ClientResult:
    (result,) = train_cohort(lora, [task], settings, **({"seed": 1, "round": 1} | changes))
    return result


def gradient(lora: LoRAModel, task: ClientTask, settings: LocalTraining, **changes: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of one step at the slot's raw factors, of which the clip is said."""
    found = train(lora, replace(task, measures_gradient=True), settings, **changes).gradient
    assert found is not None
    return {key: t * (SCALE if key.endswith(".b") else 1.0) for key, t in found.as_tensors().items()}


def norm(gradient: dict[str, torch.Tensor]) -> float:
    return math.hypot(*(float(tensor.norm()) for tensor in gradient.values()))


def drawn(*steps: Sequence[int]) -> Callable[..., Given]:
    return lambda *_: Given(*steps)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-12)


def test_the_sum_is_that_of_one_row_passes_each_clipped(llama_lora: LoRAModel, task: ClientTask) -> None:
    expected: dict[str, torch.Tensor] = {}
    norms = []
    for row in range(len(LENGTHS)):
        alone = gradient(llama_lora, replace(task, rows=task.rows.select([row])), PLAIN)
        norms.append(norm(alone))
        for key, tensor in alone.items():
            share = min(1.0, CLIP / norms[-1]) / len(LENGTHS)
            expected[key] = expected.get(key, torch.zeros_like(tensor)) + share * tensor
    assert min(norms) < CLIP < max(norms)
    assert_close(gradient(llama_lora, task, CLIPPED), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trains", [frozenset("ab"), frozenset("b")])
def test_leaving_out_any_unit_moves_the_sum_by_at_most_the_clip(
    llama_lora: LoRAModel, task: ClientTask, dropout: float, trains: frozenset[str]
) -> None:
    settings, task = replace(CLIPPED, dropout=dropout), replace(task, trains=trains)
    everybody = gradient(llama_lora, task, settings, draws=drawn(range(len(LENGTHS))))
    moves = []
    for left_out in range(len(LENGTHS)):
        others = [unit for unit in range(len(LENGTHS)) if unit != left_out]
        rest = gradient(llama_lora, task, settings, draws=drawn(others))
        moves.append(len(LENGTHS) * norm({key: everybody[key] - rest[key] for key in rest}))
        alone = gradient(llama_lora, task, settings, draws=drawn([left_out]))
        assert moves[-1] == pytest.approx(len(LENGTHS) * norm(alone)), "nothing of the others' parts has changed"
    assert max(moves) == pytest.approx(CLIP)


def test_rows_of_one_unit_are_clipped_together(llama_lora: LoRAModel, task: ClientTask) -> None:
    units = np.array([4, 4, 9, 4, 2, 9])
    grouped = replace(task, rows=replace(task.rows, units=units))
    assert [unit.tolist() for unit in grouped.rows.by_unit()] == [[0, 1, 3], [2, 5], [4]]
    everybody = gradient(llama_lora, grouped, CLIPPED, draws=drawn([0, 1, 2]))
    for left_out, rows in enumerate(grouped.rows.by_unit()):
        rest = gradient(llama_lora, grouped, CLIPPED, draws=drawn([u for u in range(3) if u != left_out]))
        assert 3 * norm({key: everybody[key] - rest[key] for key in rest}) <= CLIP * (1 + 1e-9)
        alone = gradient(llama_lora, replace(task, rows=task.rows.select(rows)), PLAIN)
        own = gradient(llama_lora, grouped, UNCLIPPED, draws=drawn([left_out]))
        assert_close(own, {key: tensor / 3 for key, tensor in alone.items()})


@pytest.mark.parametrize("changes", [{}, {"token_budget": 12}, {"micro_batch_size": 1}])
@pytest.mark.parametrize("most", [None, 1, 2])
def test_leaving_out_any_group_of_rows_moves_the_sum_by_at_most_the_clip_however_many_are_read(
    llama_lora: LoRAModel, task: ClientTask, changes: dict[str, int], most: int | None
) -> None:
    units = np.array([4, 4, 9, 4, 2, 9])
    grouped = replace(task, rows=replace(task.rows, units=units))
    settings = replace(PLAIN, privacy=RowPrivacy(2.0, 0.0, most), **changes)

    class Some(Given):
        """Draws of the last rows of each unit: which ones are read of one does not depend on the others."""

        def some(self, num_rows: int, most: int) -> Any:
            return np.arange(num_rows)[-most:]

    def summed(drawn: Sequence[int]) -> dict[str, torch.Tensor]:
        found = gradient(llama_lora, grouped, settings, draws=lambda *_: Some(drawn))
        return {key: 3 * tensor for key, tensor in found.items()}

    everybody, moves = summed([0, 1, 2]), []
    for left_out, rows in enumerate(grouped.rows.by_unit()):
        rest = summed([unit for unit in range(3) if unit != left_out])
        moves.append(norm({key: everybody[key] - rest[key] for key in rest}))
        alone = gradient(llama_lora, replace(task, rows=task.rows.select(rows[-most:] if most else rows)), PLAIN)
        assert moves[-1] == pytest.approx(min(2.0, norm(alone))), "the mean over its tokens, clipped as one"
    assert max(moves) == pytest.approx(2.0)


def test_a_unit_that_is_too_large_for_a_pass_is_read_in_several(llama_lora: LoRAModel, task: ClientTask) -> None:
    units, seen = np.array([4, 4, 9, 4, 2, 4]), list[int]()
    grouped = replace(task, rows=replace(task.rows, units=units))
    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 0.7), dropout=0.2)
    whole = train(llama_lora, grouped, noisy).adapter.as_tensors()
    run = Passes._run

    def counted(passes: Passes, parts: Any, turn: Any = None) -> Any:
        seen.append(sum(len(ids) for part in parts for ids, _ in part.rows))
        return run(passes, parts, turn)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Passes, "_run", counted)
        assert_close(train(llama_lora, grouped, replace(noisy, token_budget=17)).adapter.as_tensors(), whole)
    assert max(seen) == 17, "no pass is larger than the largest row and the budget"


def test_where_every_row_is_its_own_unit_no_bit_changes(llama_lora: LoRAModel, task: ClientTask) -> None:
    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 0.7), dropout=0.2, batch_size=3)
    plain = train(llama_lora, task, noisy).adapter.as_tensors()
    grouped = replace(task, rows=replace(task.rows, units=np.arange(40, 46)))
    for privacy in (noisy.privacy, RowPrivacy(CLIP, 0.7, 1)):
        alone = train(llama_lora, grouped, replace(noisy, privacy=privacy)).adapter.as_tensors()
        assert all(torch.equal(alone[key], plain[key]) for key in plain)


@pytest.mark.parametrize("draws", [SeededDraws(1, 2, 3), SystemDraws(1, 2, 3)])
def test_every_row_of_a_unit_is_read_as_often(draws: Any) -> None:
    found = [draws.some(7, 3) for _ in range(700)]
    assert all(len(set(one.tolist())) == 3 and np.array_equal(one, np.sort(one)) for one in found)
    assert abs(np.bincount(np.concatenate(found), minlength=7) / 700 - 3 / 7).max() < 0.1


def test_without_clip_and_noise_it_is_plain_training_on_the_same_batches(
    llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet], task: ClientTask
) -> None:
    whole = rows_of_lengths([6] * 6)  # as many targets in each row, so that a mean of rows is one of tokens
    rows = replace(whole, supervised=np.ones(whole.num_tokens, np.bool_))
    settings = {"batch_size": 2, "steps": 6, "weight_decay": 0.1, "schedule": "cosine", "proximal": 0.1}
    order = [batch.tolist() for batch in batches(6, 2, stream(1, "batches", 1, 7), steps=6)]
    plain = train(llama_lora, replace(task, rows=rows), replace(PLAIN, **settings))
    private = train(llama_lora, replace(task, rows=rows), replace(UNCLIPPED, **settings), draws=drawn(*order, []))
    assert_close(private.adapter.as_tensors(), plain.adapter.as_tensors())
    assert private.stats.num_steps == plain.stats.num_steps == 6


PARTS = ({"micro_batch_size": 1}, {"micro_batch_size": 4}, {"token_budget": 12})


def test_how_a_batch_is_cut_into_passes_changes_nothing(llama_lora: LoRAModel, task: ClientTask) -> None:
    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 0.7), dropout=0.2)
    whole = train(llama_lora, task, noisy).adapter.as_tensors()
    for changes in PARTS:
        assert_close(train(llama_lora, task, replace(noisy, **changes)).adapter.as_tensors(), whole)


def test_how_a_batch_is_cut_changes_no_bit_where_a_products_rows_do_not_depend_on_their_number(
    tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    probe, weight = (torch.randn(n, 32, generator=torch.Generator().manual_seed(1)) for n in (60, 64))
    if any(not torch.equal(probe[:n] @ weight.T, (probe @ weight.T)[:n]) for n in (4, 7, 30)):
        pytest.skip("this machine's matrix products depend on the number of rows")
    model = tiny("llama", torch.float32)
    lora = LoRAModel(model, resolve_targets(model))
    task = ClientTask(7, rows_of_lengths([9, 4, 17, 5, 8, 11]), 4, SCALE, moved(fresh_adapter(lora.shapes, 4, 0, 1)))
    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 0.7), dropout=0.2)
    whole = train(lora, task, noisy).adapter.as_tensors()
    for changes in PARTS:
        parts = train(lora, task, replace(noisy, **changes)).adapter.as_tensors()
        assert all(torch.equal(parts[key], whole[key]) for key in whole), changes


def test_clients_together_train_as_one_by_one(llama_lora: LoRAModel, task: ClientTask) -> None:
    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 0.7))
    other = replace(task, client=8, rank=2, start=fresh_adapter(llama_lora.shapes, 2, 0, 2))
    together = train_cohort(llama_lora, [task, other], noisy, seed=1, round=1)
    for one, result in zip((task, other), together, strict=True):
        alone = train(llama_lora, one, noisy).adapter.as_tensors()
        assert all(torch.equal(tensor, alone[key]) for key, tensor in result.adapter.as_tensors().items())


def test_the_noise_has_the_deviation_that_is_said_and_is_new_in_every_step_round_and_client(
    llama_lora: LoRAModel, task: ClientTask
) -> None:
    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 3.0))
    quiet = gradient(llama_lora, task, CLIPPED, draws=drawn(range(6)))

    def noise(task: ClientTask = task, **changes: Any) -> torch.Tensor:
        class Everybody(SeededDraws):
            def units(self, num_units: int, rate: float) -> Any:
                return np.arange(num_units)

        found = gradient(llama_lora, task, noisy, **({"draws": Everybody} | changes))
        return torch.cat([(found[key] - quiet[key]).flatten() for key in quiet]) * len(LENGTHS)

    first = noise()
    assert float(first.std()) == pytest.approx(3.0 * CLIP, rel=0.08)
    assert abs(float(first.mean())) < 1.0
    assert torch.equal(first, noise())
    for other in (noise(seed=2), noise(round=2), noise(replace(task, client=8))):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.15


def test_the_noise_of_a_sum_has_its_variance() -> None:
    (whole,) = [torch.full((300, 400), 5.0, dtype=torch.float64)]
    add_noise([whole], SeededDraws(1, 1, 1), 2.5)
    assert float(whole.mean()) == pytest.approx(5.0, abs=0.03)
    assert float(whole.var()) == pytest.approx(2.5**2, rel=0.02)


def test_an_empty_batch_is_a_step_of_noise_alone(llama_lora: LoRAModel, task: ClientTask) -> None:
    result = train(llama_lora, task, CLIPPED, draws=drawn([]))
    start = task.start.as_tensors()
    assert result.stats.num_steps == 3
    assert all(torch.equal(t, start[key].to(t)) for key, t in result.adapter.as_tensors().items()), "without noise"

    class Nobody(SeededDraws):
        def units(self, num_units: int, rate: float) -> Any:
            return np.arange(0)

    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 1.0))
    assert norm(gradient(llama_lora, task, noisy, draws=Nobody)) > 0.0


def test_a_frozen_factor_gets_neither_noise_nor_steps(llama_lora: LoRAModel, task: ClientTask) -> None:
    frozen = replace(task, trains=frozenset("b"))
    noisy = replace(PLAIN, privacy=RowPrivacy(CLIP, 1.0))
    start, found = task.start.as_tensors(), train(llama_lora, frozen, noisy).adapter.as_tensors()
    assert all(torch.equal(t, start[key].to(t)) == key.endswith(".a") for key, t in found.items())
    assert all((norm({key: t}) > 0.0) == key.endswith(".b") for key, t in gradient(llama_lora, frozen, noisy).items())


def test_what_is_counted_does_not_depend_on_the_rows_that_were_drawn(llama_lora: LoRAModel, task: ClientTask) -> None:
    some, others = (train(llama_lora, task, CLIPPED, draws=drawn(units)).stats for units in ([0, 1, 2], [4]))
    assert replace(some, seconds=0.0) == replace(others, seconds=0.0)
    assert (some.num_rows, some.num_steps, some.num_tokens, some.loss_nats) == (6, 3, 0, 0.0)


def test_a_unit_whose_gradient_is_not_finite_adds_nothing() -> None:
    parts = [torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 0.0], [0.0, 0.0], [0.3, 0.4]])]
    (whole,) = [torch.zeros(2)]
    add_clipped([whole], parts, 1.0)
    torch.testing.assert_close(whole, torch.tensor([0.6 + 0.3, 0.8 + 0.4]))


@pytest.mark.parametrize("draws", [SeededDraws(1, 2, 3), SystemDraws(1, 2, 3)])
def test_every_unit_is_in_a_batch_with_the_same_probability_and_normals_are_normal(
    draws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's draws are made of seeded bytes here, or one run in ten thousand would be red."""
    monkeypatch.setattr(os, "urandom", stream(1, "bytes").bytes)
    counts = np.zeros(50)
    sizes = []
    for _ in range(400):
        units = draws.units(50, 0.2)
        counts[units] += 1
        sizes.append(len(units))
    assert abs(counts / 400 - 0.2).max() < 0.1
    assert np.mean(sizes) == pytest.approx(10, abs=0.6)
    assert np.var(sizes) == pytest.approx(8, rel=0.4), "binomial: units are drawn one by one"
    normals = draws.normals(100_001).astype(np.float64)
    assert normals.shape == (100_001,)
    assert abs(normals.mean()) < 0.02
    assert normals.var() == pytest.approx(1.0, abs=0.03)
    assert (normals**4).mean() == pytest.approx(3.0, abs=0.2)
    assert abs(np.corrcoef(normals[:50_000], normals[50_000:100_000])[0, 1]) < 0.03


def test_the_systems_draws_never_repeat() -> None:
    one, other = SystemDraws(1, 2, 3), SystemDraws(1, 2, 3)
    assert not np.array_equal(one.normals(8), other.normals(8))
