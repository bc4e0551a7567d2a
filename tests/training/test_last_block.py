"""The last block computes the targets' rows alone, and neither a hidden state nor a gradient shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.data.tokens import TokenSet
from fedloom.lora.dropout import dropout_of, row_keys
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models.families import resolve_targets
from fedloom.training import last_block
from fedloom.training.last_block import needed_rows
from fedloom.training.packing import hidden_states, pack, target_states
from fedloom.training.verified_head import output_head

LENGTHS = [9, 4, 17, 5, 8]
MADE_ANOTHER_WAY = {"olmo2", "cohere", "phi"}
"""No norm of its own in front of the attention."""


def states_and_gradients(lora: LoRAModel, rows: TokenSet) -> list[Tensor]:
    """Return the targets' hidden states of two clients' rows, and the gradients of the clients' factors."""
    batch = pack([rows.row(i) for i in range(len(rows))])
    split = sum(LENGTHS[:2])
    keys = [row_keys(0, 1, 0, list(range(len(rows))))]
    dropout = dropout_of(0.2, keys, batch.lengths, "cpu")
    lora.zero_grad()
    lora.route([(1, split), (0, batch.num_tokens - split)], dropout, batch.lengths, batch.needed_index_K)
    hidden_SD = target_states(lora.model, batch)
    hidden_SD.backward(torch.linspace(-1, 1, hidden_SD.numel(), dtype=hidden_SD.dtype).view_as(hidden_SD))
    factors = [factor for slot in (0, 1) for factor in lora.parameters(slot)]
    return [hidden_SD.detach(), *(factor.grad.clone() for factor in factors if factor.grad is not None)]


def test_states_and_gradients_are_those_of_a_whole_last_block(
    family: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = tiny(family), rows_of_lengths(LENGTHS)
    output_head(model)
    assert (model in last_block._FOUND) == (family not in MADE_ANOTHER_WAY)
    lora = LoRAModel(model, resolve_targets(model, ["all-linear"]))
    lora.open([Slot(2, 2.0), Slot(3, 0.5)])
    for slot, rank in enumerate((2, 3)):
        start = fresh_adapter(lora.shapes, rank, 0, slot)
        lora.load(slot, start)
        for factor in lora.parameters(slot):
            factor.data.normal_(generator=torch.Generator().manual_seed(slot))
    found = states_and_gradients(lora, rows)
    last_block._FOUND.pop(model, None)
    expected = states_and_gradients(lora, rows)
    rounding = 1e-11 * max(float(whole.abs().max()) for whole in expected)
    for one, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(one, whole, rtol=1e-9, atol=rounding)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_follows_the_attention_gets_the_targets_alone(
    kind: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = tiny(kind), rows_of_lengths(LENGTHS)
    output_head(model)
    seen: list[int] = []
    for block in model.get_submodule("model.layers" if kind == "llama" else "transformer.h"):
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    batch = pack([rows.row(i) for i in range(len(rows))])
    target_states(model, batch)
    assert seen == [sum(LENGTHS), len(batch.needed_index_K)]
    assert len(batch.needed_index_K) < sum(LENGTHS)
    hidden_states(model, batch)
    assert seen[2:] == [sum(LENGTHS)] * 2


def test_a_sample_of_few_targets_gets_rows_by_itself_alone() -> None:
    """Four at least, if it has so many: the bits of a product's row then do not depend on who shares the pass."""
    assert needed_rows(torch.tensor([2, 6, 7, 8, 9, 10]), (6, 8, 2)).tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15]
