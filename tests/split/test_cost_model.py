"""The cost model: simple cases by hand, monotone where it must be, and in the order that is measured."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from split.split_cases import DEPTH, PLAN, wrapped

from fedloom.errors import CutError
from fedloom.lora.layer import Slot
from fedloom.models.cut import part_of
from fedloom.split.cost_model import (
    CutEstimate,
    Device,
    ModelShape,
    Work,
    centralised_seconds,
    estimate_cut,
    federated_seconds,
    pipelined,
    shape_of,
    split_seconds,
    suggest_cut,
    trained_parameters,
)
from fedloom.split.plan import SERVER
from fedloom.split.split_step import Arrival, ServerHalf, backward_from_labels, run_bottom
from fedloom.training.packing import pack
from fedloom.training.verified_head import output_head

SHAPE = ModelShape(10, (100, 100, 100, 100), (20, 20, 20, 20), 50, 70)
WORK = Work(tokens_per_step=8, loss_tokens_per_step=4, tokens_per_sample=4)
DEVICE = Device(1e3, 1e9, 100.0, 200.0, 0.5)


def estimate(cut_layer: int = 1, **changes: Any) -> CutEstimate:
    plan = replace(PLAN, cut_layers=(cut_layer,) * 3, wire_dtype="bf16", gradient_wire_dtype="bf16", **changes)
    return estimate_cut(SHAPE, plan, 0, WORK, DEVICE, 1e4, 3)


def test_one_client_block_by_hand() -> None:
    found = estimate()
    forward = 8 * (2 * 100 + 2 * 4 * 10 + 2 * 3 * 20)
    backward = forward + 8 * 2 * 3 * 20
    assert found.client_flops_per_step == forward + backward
    assert found.stages["client forward"] == forward / 1e3
    assert found.upload_bytes_per_step == 8 * 10 * 2 + 4 * 2 + 8 * 4
    assert found.download_bytes_per_step == 8 * 10 * 2
    assert found.stages["down"] == 160 / 200 + 0.5
    assert found.client_parameters == 50 + 100
    assert found.aggregation_bytes == 2 * 4 * 3 * 20
    server = 3 * (8 * 3 * (2 * (200 + 80 + 120) + 120) + 4 * 70 * 4)
    assert found.stages["server"] == pytest.approx(server / 1e4)
    assert found.step_seconds == pytest.approx(sum(found.stages.values()))


def test_a_deeper_cut_costs_the_client_more_and_the_server_less() -> None:
    estimates = [estimate(cut_layer) for cut_layer in (1, 2, 3)]
    for shallow, deep in pairwise(estimates):
        assert deep.client_flops_per_step > shallow.client_flops_per_step
        assert deep.stages["server"] < shallow.stages["server"]
        assert deep.upload_bytes_per_step == shallow.upload_bytes_per_step


def test_frozen_halves_receive_nothing_and_aggregate_nothing() -> None:
    frozen = estimate(client_half="frozen")
    assert (frozen.download_bytes_per_step, frozen.aggregation_bytes, frozen.aggregation_seconds) == (0, 0, 0.0)
    assert frozen.stages["client backward"] == 0.0


def test_a_u_shape_crosses_four_times_and_keeps_the_head_at_the_client() -> None:
    plain, u_shape = estimate(), estimate(tail_blocks=1)
    assert u_shape.client_parameters == plain.client_parameters + 100 + 70
    assert u_shape.download_bytes_per_step == 2 * plain.download_bytes_per_step
    assert u_shape.stages["tail"] > 0.0


def test_micro_batches_hide_all_stages_but_the_slowest() -> None:
    assert pipelined([1.0, 2.0, 3.0], 1) == 6.0
    assert pipelined([1.0, 2.0, 3.0], 2) == 4.5
    assert pipelined([1.0, 2.0, 3.0], 1000) == pytest.approx(3.0, abs=0.01)


def test_the_suggestion_fits_memory_and_respects_the_floor() -> None:
    estimates = [estimate(cut_layer) for cut_layer in (1, 2, 3)]
    assert all(e.fits for e in estimates)
    assert suggest_cut(estimates).cut_layer == 1
    assert suggest_cut(estimates, lowest_cut=2).cut_layer == 2
    with pytest.raises(CutError, match="found none"):
        suggest_cut([replace(e, fits=False) for e in estimates])


def test_a_client_fits_that_holds_no_more_than_its_device_has() -> None:
    plan = replace(PLAN, cut_layers=(1,) * 3)
    for bytes_held, fits in ((1_000_000_000, True), (1_000_000_001, False)):
        found = estimate_cut(SHAPE, plan, 0, WORK, DEVICE, 1e4, 3, bytes_held)
        assert (found.client_memory_bytes, found.fits) == (bytes_held, fits)


def test_the_papers_order_of_latencies_holds_where_the_server_is_stronger() -> None:
    """GPT-2 small, 3 clients of 35.6 TFLOPS and a link fast enough: split before federated before centralised."""
    shape = ModelShape(768, (7_087_872,) * 12, (3_840,) * 12, 39_383_808, 38_597_376)
    device = Device(35.6e12, 24e9, 1e9, 1e9, 0.0)
    work, plan = Work(8 * 64, 8 * 28, 64), replace(PLAN, cut_layers=(3, 3, 3), wire_dtype="bf16")
    split = split_seconds([estimate_cut(shape, plan, 0, work, device, 312e12, 3)], 1000, 100)
    federated = federated_seconds(shape, [4] * 3, [work] * 3, [device] * 3, 100, 10)
    centralised = centralised_seconds(shape, 4, [work] * 3, 35.6e12, 1000)
    assert split < federated < centralised


def test_a_models_shape_is_read_off_wrapped_or_not() -> None:
    lora = wrapped("llama")
    wrapped_shape = shape_of(lora.model, lora.shapes)
    shapes = lora.shapes
    assert wrapped_shape == shape_of(lora.unwrap(), shapes)
    assert wrapped_shape.num_blocks == DEPTH
    assert wrapped_shape.adapter_sides == (64 + 48,) * DEPTH


def test_trained_parameters_of_all_parties_are_those_of_the_adapter() -> None:
    lora = wrapped("llama")
    plan = replace(PLAN, cut_layers=(1, 1, 1))
    own = [trained_parameters(plan, lora.model, lora.shapes, owner) for owner in (0, SERVER)]
    assert sum(own) == 3 * sum(sum(shape) for shape in lora.shapes.values())
    assert own[0] * 3 == own[1]


def test_the_models_stage_order_is_the_measured_one() -> None:
    """Same computer for both sides: at a shallow cut the server's stage is the longest, at a deep one the client's."""
    lora = wrapped("llama")
    head = output_head(lora.model)
    lora.open([Slot(3, 2.0)])
    rows = [(torch.arange(3, 59).numpy(), torch.ones(56, dtype=torch.bool).numpy())] * 16
    batch, shape = pack(rows), shape_of(lora.model, lora.shapes)
    work = Work(batch.num_tokens, len(batch.targets_S), 56)
    for cut_layer in (1, 3):
        bottom, server = part_of(lora.model, 0, cut_layer), ServerHalf(lora.model, [cut_layer])
        fastest = {"client": float("inf"), "server": float("inf")}
        for _ in range(4):
            lora.route_all(0)
            begun = time.perf_counter()
            hidden_TD = run_bottom(bottom, batch)
            sent = time.perf_counter()
            labels, targets = (batch.target_index_S, batch.targets_S), len(batch.targets_S)
            arrival = Arrival(0, cut_layer, hidden_TD.detach(), batch.lengths, targets, 1.0, *labels)
            done = server.forward([arrival], wants_gradients=True)
            backward_from_labels(done, head)
            returned = time.perf_counter()
            hidden_TD.backward(done.gradients()[0])
            ended = time.perf_counter()
            fastest["client"] = min(fastest["client"], sent - begun + ended - returned)
            fastest["server"] = min(fastest["server"], returned - sent)
        plan = replace(PLAN, cut_layers=(cut_layer,) * 3)
        stages = estimate_cut(shape, plan, 0, work, Device(1e9, 1e9, 1e9, 1e9), 1e9, 1).stages
        client = stages["client forward"] + stages["client backward"]
        assert (client > stages["server"]) == (fastest["client"] > fastest["server"]) == (cut_layer == 3)
