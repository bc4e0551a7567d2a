"""Scores of rows are the model's own losses, whatever the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.data.tokens import TokenSet
from fedloom.errors import ModelError
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.pair import Adapter, Pair
from fedloom.models.families import resolve_targets
from fedloom.training import cores
from fedloom.training.row_losses import check_finite, row_losses
from fedloom.training.verified_head import output_head

LENGTHS = [9, 3, 17, 1, 10, 9]


@pytest.mark.parametrize("token_budget", [1, 20, 1000])
def test_row_losses_equal_the_models_own_losses(
    family: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet], token_budget: int
) -> None:
    model, rows = tiny(family), rows_of_lengths(LENGTHS)
    scores = row_losses(model, rows, token_budget=token_budget)
    for index in range(len(rows)):
        ids, supervised = (torch.from_numpy(part.copy()) for part in rows.row(index))
        logits_TV = model(input_ids=ids.long()[None], use_cache=False).logits[0]
        nats = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:].long(), reduction="none")[supervised[1:]]
        assert scores.num_loss_tokens[index] == len(nats)
        assert scores.sum_nats[index] == pytest.approx(float(nats.sum()), rel=1e-6, abs=1e-9)
    assert scores.mean_nats == pytest.approx(scores.sum_nats.sum() / scores.num_loss_tokens.sum())


def test_a_routed_adapter_is_scored(llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]) -> None:
    rows = rows_of_lengths(LENGTHS)
    base = row_losses(llama_lora, rows, token_budget=30).sum_nats
    start = fresh_adapter(llama_lora.shapes, 2, 0)
    llama_lora.open([Slot(2, 1.0)])
    llama_lora.load(0, start)
    llama_lora.route_all(0)
    np.testing.assert_allclose(row_losses(llama_lora, rows, token_budget=30).sum_nats, base, rtol=1e-12)
    llama_lora.parameters(0)[1].data.fill_(1.0)
    assert not np.allclose(row_losses(llama_lora, rows, token_budget=30).sum_nats, base)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_number_of_cores_gives_the_same_bits(
    kind: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under an adapter that rows are routed to, which a thread of its own knows too."""
    monkeypatch.setattr(cores, "PART_TOKENS", 20)
    model, rows = tiny(kind, torch.float32), rows_of_lengths(LENGTHS * 3)
    lora = LoRAModel(model, resolve_targets(model))
    lora.open([Slot(2, 1.0)])
    lora.load(0, fresh_adapter(lora.shapes, 2, 0))
    lora.parameters(0)[1].data.fill_(1.0)
    base = row_losses(model, rows, token_budget=100, cores=1).sum_nats
    lora.route_all(0)
    few, many, usual = (row_losses(lora, rows, token_budget=100, cores=number).sum_nats for number in (1, 4, None))
    assert few.tobytes() == many.tobytes() == usual.tobytes() != base.tobytes()


@pytest.mark.parametrize("rank", [1, 20])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_an_adapter_on_the_output_head_is_scored_and_removed_again(
    family: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet], rank: int
) -> None:
    """Both ways of adding a side: in factors, and folded into a copy of the weight."""
    model, rows = tiny(family), rows_of_lengths(LENGTHS)
    before, generator = row_losses(model, rows, token_budget=30).sum_nats, torch.Generator().manual_seed(0)
    lora = LoRAModel(model, ["lm_head"])
    (num_out, num_in), dtype = lora.shapes["lm_head"], model.dtype
    b_OR, a_RI = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((num_out, rank), (rank, num_in)))
    lora.set_side(Adapter({"lm_head": Pair(b_OR, a_RI)}))
    found = row_losses(lora, rows, token_budget=30).sum_nats
    for index in (0, 2):
        ids, supervised = (torch.from_numpy(part.copy()) for part in rows.row(index))
        logits_TV = model(input_ids=ids.long()[None], use_cache=False).logits[0]
        nats = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:].long(), reduction="none")[supervised[1:]]
        assert found[index] == pytest.approx(float(nats.detach().sum()), rel=1e-6)
    assert not np.allclose(found, before)
    lora.set_side(None)
    np.testing.assert_allclose(row_losses(lora, rows, token_budget=30).sum_nats, before, rtol=1e-12)


LOUD = 5
"""A token that only rows hold, and not the samples with which the path to the loss is compared."""


def overflows_on_one_token(model: Any, dtype: torch.dtype) -> LoRAModel:
    """Give a Llama one token whose activations pass 65504 in its first block."""
    loud = model.float()
    loud.get_input_embeddings().weight.data[:, 0] = 0
    loud.get_input_embeddings().weight.data[LOUD] *= 0
    loud.get_input_embeddings().weight.data[LOUD, 0] = 1
    loud.model.layers[0].self_attn.o_proj.weight.data[0] = 0  # nothing else reaches its place before the mlp
    mlp = loud.model.layers[0].mlp
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight):
        weight.data.mul_(0.1)
    mlp.gate_proj.weight.data[:, 0] = mlp.up_proj.weight.data[:, 0] = 60
    mlp.down_proj.weight.data[0] = 10
    lora = LoRAModel(loud.to(dtype), ["model.layers.0.self_attn.q_proj"])
    output_head(lora.model)  # the short samples show nothing
    return lora


@pytest.mark.parametrize("loud_row", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_that_overflows_on_real_rows_alone_is_called_that(
    dtype: torch.dtype, loud_row: int, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    """Whether it is among the first rows or the longest one."""
    lora, rows = overflows_on_one_token(tiny("llama"), dtype), rows_of_lengths([6, 6, 6, 6, 9])
    ids = np.where(rows.input_ids == LOUD, LOUD + 1, rows.input_ids)
    quiet = TokenSet(ids.copy(), rows.supervised, rows.starts)
    check_finite(lora, quiet, token_budget=30)
    ids[rows.starts[loud_row] + 1] = LOUD
    told = r"finite logits of 'llama', got infinity or NaN in float16, .*set model\.dtype = float32 or bfloat16"
    loud = TokenSet(ids, rows.supervised, rows.starts)
    if dtype == torch.float16:
        with pytest.raises(ModelError, match=told):
            check_finite(lora, loud, token_budget=30)
    else:
        check_finite(lora, loud, token_budget=30)
