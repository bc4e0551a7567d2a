"""One split step equals the unsplit step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from split.split_cases import DEPTH, FAMILIES, random_adapter, random_rows, wrapped
from torch import Tensor

from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models.cut import part_of, top_of
from fedloom.split.split_step import (
    Arrival,
    ServerHalf,
    backward_from_labels,
    backward_from_tails,
    rows_of_step,
    run_bottom,
    tail_step,
)
from fedloom.training.loss import supervised_cross_entropy
from fedloom.training.packing import PackedBatch, hidden_states, pack
from fedloom.training.verified_head import output_head

ROWS = random_rows(6)


def with_slots(case: str, num_slots: int = 1, device: str = "cpu") -> LoRAModel:
    lora = wrapped(case, device)
    lora.open([Slot(3, 2.0)] * num_slots)
    for slot in range(num_slots):
        lora.load(slot, random_adapter(lora, 3, seed=0))
    return lora


def gradients(lora: LoRAModel) -> dict[str, Tensor]:
    found = {}
    for name, layer in lora.layers.items():
        found |= {f"{name}.a": layer.a_RI.grad.clone(), f"{name}.bt": layer.bt_RO.grad.clone()}
    return found


def unsplit_step(lora: LoRAModel, batch: PackedBatch, smoothing: float = 0.0) -> tuple[float, dict[str, Tensor]]:
    """Return mean loss and every LoRA gradient of an ordinary step."""
    lora.route_all(0)
    hidden_SD = hidden_states(lora.model, batch)[batch.target_index_S]
    weights_S = torch.full_like(batch.targets_S, 1 / len(batch.targets_S), dtype=torch.float64)
    head = output_head(lora.model)
    loss, nats_S = supervised_cross_entropy(hidden_SD, head, batch.targets_S, weights_S, label_smoothing=smoothing)
    loss.backward()
    return float(nats_S.mean()), gradients(lora)


def arrival_of(batch: PackedBatch, hidden_TD: Tensor, cut_layer: int, client: int = 0, weight: float = 1.0) -> Arrival:
    targets = len(batch.targets_S)
    return Arrival(
        client, cut_layer, hidden_TD.detach(), batch.lengths, targets, weight, batch.target_index_S, batch.targets_S
    )


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()) + 1e-8)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("cut_layer", range(1, DEPTH))
def test_a_split_step_equals_the_unsplit_step(case: str, cut_layer: int) -> None:
    lora, batch = with_slots(case), pack([ROWS.row(i) for i in range(6)])
    head = output_head(lora.model)
    loss, expected = unsplit_step(lora, batch, smoothing=0.1)
    lora.zero_grad()
    hidden_TD = run_bottom(part_of(lora.model, 0, cut_layer), batch)
    done = ServerHalf(lora.model, [cut_layer]).forward([arrival_of(batch, hidden_TD, cut_layer)], wants_gradients=True)
    nats = backward_from_labels(done, head, label_smoothing=0.1)
    hidden_TD.backward(done.gradients()[0])
    assert nats[0] / len(batch.targets_S) == pytest.approx(loss, abs=1e-6)
    assert_same(gradients(lora), expected)


def test_a_split_step_on_a_device_equals_the_unsplit_step_there(device: str) -> None:
    lora, batch = with_slots("llama", device=device), pack([ROWS.row(i) for i in range(6)], device)
    head = output_head(lora.model)
    loss, expected = unsplit_step(lora, batch)
    lora.zero_grad()
    hidden_TD = run_bottom(part_of(lora.model, 0, 2), batch)
    done = ServerHalf(lora.model, [2]).forward([arrival_of(batch, hidden_TD, 2)], wants_gradients=True)
    nats = backward_from_labels(done, head)
    hidden_TD.backward(done.gradients()[0])
    assert nats[0] / len(batch.targets_S) == pytest.approx(loss, abs=1e-6)
    assert_same(gradients(lora), expected)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize(("cut_layer", "tail_blocks"), [(1, 0), (1, 1), (2, 1), (1, 2)])
def test_a_u_shaped_step_equals_the_unsplit_step(case: str, cut_layer: int, tail_blocks: int) -> None:
    lora, batch = with_slots(case), pack([ROWS.row(i) for i in range(6)])
    head, stop = output_head(lora.model), DEPTH - tail_blocks
    loss, expected = unsplit_step(lora, batch)
    lora.zero_grad()
    hidden_TD = run_bottom(part_of(lora.model, 0, cut_layer), batch)
    arrival = replace(arrival_of(batch, hidden_TD, cut_layer), target_index_S=None, targets_S=None)
    done = ServerHalf(lora.model, [cut_layer], stop).forward([arrival], wants_gradients=True)
    weights_S = torch.full_like(batch.targets_S, 1 / len(batch.targets_S), dtype=torch.float64)
    gradient_TD, nats_S = tail_step(top_of(lora.model, stop), head, done.hidden_of(0), batch, weights_S)
    backward_from_tails(done, {0: gradient_TD})
    hidden_TD.backward(done.gradients()[0])
    assert float(nats_S.mean()) == pytest.approx(loss, abs=1e-6)
    assert_same(gradients(lora), expected)


@pytest.mark.parametrize("cuts", [(2, 2, 2), (1, 2, 3), (3, 1, 1)])
def test_clients_joined_at_the_server_equal_one_large_batch(cuts: tuple[int, ...]) -> None:
    lora = with_slots("llama")
    head = output_head(lora.model)
    loss, expected = unsplit_step(lora, pack([ROWS.row(i) for i in range(6)]))
    lora.zero_grad()
    batches = [pack([ROWS.row(2 * k), ROWS.row(2 * k + 1)]) for k in range(3)]
    total = sum(len(batch.targets_S) for batch in batches)
    bottoms = [run_bottom(part_of(lora.model, 0, cut), batch) for cut, batch in zip(cuts, batches, strict=True)]
    weights = [len(batch.targets_S) / total for batch in batches]
    arrivals = [arrival_of(batches[k], bottoms[k], cuts[k], k, weights[k]) for k in range(3)]
    done = ServerHalf(lora.model, cuts).forward(arrivals, wants_gradients=True)
    nats = backward_from_labels(done, head)
    for k, hidden_TD in enumerate(bottoms):
        hidden_TD.backward(weights[k] * done.gradients()[k])
    assert sum(nats.values()) / total == pytest.approx(loss, abs=1e-6)
    assert_same(gradients(lora), expected)


def test_a_client_without_a_label_gets_no_gradient_and_disturbs_nobody() -> None:
    lora = with_slots("llama")
    head, batch = output_head(lora.model), pack([ROWS.row(0)])
    silent = replace(arrival_of(batch, run_bottom(part_of(lora.model, 0, 2), batch), 2, client=1, weight=0.0))
    silent = replace(silent, num_loss_tokens=0, target_index_S=batch.target_index_S[:0], targets_S=batch.targets_S[:0])
    learning = arrival_of(batch, silent.hidden_TD, 2)
    done = ServerHalf(lora.model, [2]).forward([learning, silent], wants_gradients=True)
    nats = backward_from_labels(done, head)
    assert nats[1] == 0.0
    assert not done.gradients()[1].any()
    assert done.gradients()[0].any()


def test_every_row_is_read_once_per_epoch_and_epochs_differ() -> None:
    steps = [rows_of_step(1, 0, 10, 4, step) for step in range(5)]
    rows = [int(row) for step in steps for row in step]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_batches_depend_on_seed_client_and_step(other: tuple[int, int, int]) -> None:
    seed, client, step = other
    assert rows_of_step(1, 0, 100, 8, 0).tolist() != rows_of_step(seed, client, 100, 8, step).tolist()


def test_steps_follow_one_another_without_gap() -> None:
    fine = [row for step in range(6) for row in rows_of_step(1, 0, 7, 2, step)]
    coarse = [row for step in range(2) for row in rows_of_step(1, 0, 7, 6, step)]
    assert fine == coarse
    assert all(len(rows_of_step(1, 0, 3, 8, step)) == 8 for step, _ in pairwise(range(4)))
