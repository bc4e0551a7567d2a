"""The table of cuts has its memory from the run's plan: what a client's own pass holds, and its part of the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from split.split_cases import wrapped

from fedloom.assembly.inputs import lora_of
from fedloom.config import Settings
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models.cut import part_of
from fedloom.preview.cut_table import CutTable, cut_table
from fedloom.preview.description import skeleton
from fedloom.preview.held_bytes import HeldBytes, PlannedPass, bottom_bytes
from fedloom.split.split_step import run_bottom
from fedloom.training.packing import pack

Make = Callable[..., Settings]
LENGTHS = (40, 33, 25)


@pytest.fixture
def table_of(settings_for: Make) -> Callable[..., CutTable]:
    """Return a function that makes the table of a small recipe with settings of its own."""

    def table(**changes: Any) -> CutTable:
        settings = settings_for(
            method__name="splitlora", method__ranks=4, model__base="embedded", model__tokenizer="bytes", **changes
        )
        model = skeleton(settings)
        return cut_table(settings, lora_of(model.to(torch.float32), settings.model.target_modules))

    return table


def held_for_real(lora: LoRAModel, cut_layer: int) -> int:
    """Run a client's pass on numbers and return the most bytes that it held."""
    rows = [(np.arange(n, dtype=np.int32) % 50, np.ones(n, dtype=bool)) for n in LENGTHS]
    batch, part = pack(rows), part_of(lora.model, 0, cut_layer)
    _ = batch.layout
    with HeldBytes([*lora.model.parameters(), *lora.model.buffers()]) as held:
        lora.open_narrow([Slot(4, 1.0)])
        lora.route([(0, batch.num_tokens)], None, batch.lengths)
        hidden_TD = run_bottom(part, batch)
        torch.autograd.backward(hidden_TD, torch.ones_like(hidden_TD))
    lora.close()
    return held.peak


def test_a_clients_planned_pass_holds_what_its_pass_holds() -> None:
    """Two depths are watched, and the third is counted from them."""
    planned = PlannedPass(LENGTHS, sum(LENGTHS) - len(LENGTHS), (4,), (0,) * len(LENGTHS))
    real = wrapped("llama")
    shapes = LoRAModel(wrapped("llama").unwrap().to("meta"), list(real.shapes))
    for cut_layer in (1, 2, 3):
        # What is freed may be used again before it is told, so that a pass may count too little, never too much.
        held = max(held_for_real(real, cut_layer) for _ in range(5))
        assert bottom_bytes(shapes, planned, "cpu", cut_layer) == pytest.approx(held, rel=0.15)


def test_a_deeper_cut_holds_more_a_frozen_half_less_and_one_with_the_labels_more(
    table_of: Callable[..., CutTable],
) -> None:
    shallow, deep, deepest = (e.client_memory_bytes for e in table_of().estimates)
    assert shallow < deep < deepest
    frozen = table_of(split__client_half="frozen").estimates[0].client_memory_bytes
    labelled = table_of(split__labels="client", split__tail_blocks=1).estimates[0].client_memory_bytes
    assert frozen < shallow < labelled
