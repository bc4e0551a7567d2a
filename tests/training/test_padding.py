"""A padded pass is the model's own forward of each row alone, for families that cannot run packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from padded_families import TARGETS, UNPACKABLE, build
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedloom.data.tokens import TokenSet
from fedloom.errors import CutError, ModelError
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.models.cut import cut
from fedloom.models.families import resolve_targets
from fedloom.models.row_attention import Attention, choose_attention
from fedloom.training.cohort_round import ClientResult, ClientTask, LocalTraining, train_cohort
from fedloom.training.padding import pad, split_by_padded_tokens
from fedloom.training.row_losses import row_losses
from fedloom.training.row_passes import row_passes
from fedloom.training.verified_head import obstacle, output_head

LENGTHS = [9, 3, 17, 1, 10, 9]
SETTINGS = LocalTraining(learning_rate=1e-2, batch_size=6, steps=1)


def start_of(lora: LoRAModel, rank: int, seed: int = 0) -> Adapter:
    """Draw both factors, so that the gradients of both are other than zero."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: Pair(torch.randn(o, rank, generator=generator) * 0.1, torch.randn(rank, i, generator=generator) * 0.1)
            for name, (o, i) in lora.shapes.items()
        }
    )


def stock(model: Any, start: Adapter, rank: int) -> tuple[Any, dict[str, Any]]:
    """Return a copy of the model under stock peft with the same factors at scale 1, and the adapted modules."""
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(start))
    wrapped = peft.get_peft_model(copy.deepcopy(model), settings, autocast_adapter_dtype=False).eval()
    modules = {name: wrapped.get_submodule(f"base_model.model.{name}") for name in start}
    for name, module in modules.items():
        module.lora_A["default"].weight.data = start[name].a_RI.clone()
        module.lora_B["default"].weight.data = start[name].b_OR.clone()
    return wrapped, modules


def nats_of_each_row_alone(model: Any, rows: TokenSet) -> Tensor:
    """Return the sum of nats per row, by the model's own forward of one row at a time."""
    sums = []
    for index in range(len(rows)):
        ids, supervised = (torch.from_numpy(part.copy()) for part in rows.row(index))
        logits_TV = model(input_ids=ids.long()[None], use_cache=False).logits[0]
        nats = cross_entropy(logits_TV[:-1].float(), ids[1:].long(), reduction="none")
        sums.append(nats[supervised[1:]].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("kind", sorted(UNPACKABLE))
def test_loss_and_gradients_are_stock_pefts_on_each_row_alone(
    kind: str, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = build(kind), rows_of_lengths(LENGTHS)
    own = copy.deepcopy(model)
    lora = LoRAModel(model, resolve_targets(model, TARGETS.get(kind)))
    start = start_of(lora, 2)
    task = ClientTask(0, rows, 2, 1.0, start, measures_gradient=True)
    found = train_cohort(lora, [task], SETTINGS, seed=1, round=1)[0]
    wrapped, modules = stock(own, start, 2)
    loss = nats_of_each_row_alone(wrapped, rows).sum() / sum(int(rows.row(i)[1][1:].sum()) for i in range(len(rows)))
    loss.backward()
    assert found.stats.loss_nats == pytest.approx(loss.item(), rel=1e-5)
    assert found.gradient is not None
    for name, module in modules.items():
        expected = module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad
        for ours, theirs in zip((found.gradient[name].a_RI, found.gradient[name].b_OR), expected, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name


@pytest.mark.parametrize("kind", sorted(UNPACKABLE))
def test_what_cannot_run_packed_says_so_with_the_way_out(kind: str) -> None:
    model = build(kind, "packed")
    told = obstacle(model, "packed")
    assert told is not None
    assert told.startswith("model.base: ")
    assert "set model.attention = padded" in told
    assert obstacle(model, "padded") is None
    assert row_passes(model).name == "packed"


@pytest.mark.parametrize("token_budget", [1, 20, 1000])
def test_scores_are_the_models_own_whatever_rows_share_a_pass(
    token_budget: int, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = build("falcon_h1"), rows_of_lengths(LENGTHS)
    with torch.no_grad():
        expected = nats_of_each_row_alone(model, rows)
    found = row_losses(model, rows, token_budget=token_budget).sum_nats
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=1e-5, atol=1e-5)


def trained(lora: LoRAModel, attention: Attention, rows: Callable[..., TokenSet], **changes: Any) -> list[ClientResult]:
    choose_attention(lora.model, attention)
    tasks = [
        ClientTask(10 + k, rows(lengths, k), rank, 2.0, start_of(lora, rank, k))
        for k, (lengths, rank) in enumerate(((LENGTHS, 4), ([21, 2, 6, 5], 2)))
    ]
    settings = replace(SETTINGS, steps=4, batch_size=3, dropout=0.3, max_grad_norm=0.5)
    return train_cohort(lora, tasks, replace(settings, **changes), seed=1, round=1)


def assert_same(some: list[ClientResult], others: list[ClientResult]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.stats.num_tokens == other.stats.num_tokens
        assert one.stats.loss_nats == pytest.approx(other.stats.loss_nats, rel=1e-9)
        for name, pair in one.adapter.items():
            torch.testing.assert_close(pair.a_RI, other.adapter[name].a_RI, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(pair.b_OR, other.adapter[name].b_OR, rtol=1e-6, atol=1e-6)


def test_padded_training_is_packed_training_with_dropout_too(
    llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    packed, padded = (trained(llama_lora, attention, rows_of_lengths) for attention in ("packed", "padded"))
    assert_same(packed, padded)


@pytest.mark.parametrize("changes", [{"token_budget": 25}, {"micro_batch_size": 1}, {"token_budget": 60}])
def test_no_budget_changes_a_padded_result(
    changes: dict[str, int], llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    whole, cut_up = (trained(llama_lora, "padded", rows_of_lengths, **given) for given in ({}, changes))
    assert_same(whole, cut_up)


def test_clients_of_a_hybrid_in_one_pass_have_the_gradients_of_those_alone(
    rows_of_lengths: Callable[..., TokenSet],
) -> None:
    model = build("jamba")
    lora = LoRAModel(model, resolve_targets(model, ["in_proj", "q_proj", "v_proj", "o_proj"]))
    tasks = [
        ClientTask(k, rows_of_lengths([7, 3, 5 + k], k), 2, 2.0, start_of(lora, 2, k), measures_gradient=True)
        for k in (0, 1)
    ]
    settings = replace(SETTINGS, dropout=0.2)
    together = train_cohort(lora, tasks, settings, seed=1, round=1)
    for one, task in zip(together, tasks, strict=True):
        (alone,) = train_cohort(lora, [task], settings, seed=1, round=1)
        assert one.gradient is not None
        assert alone.gradient is not None
        for name, pair in one.gradient.items():
            assert (pair.a_RI - alone.gradient[name].a_RI).norm() <= 1e-4 * alone.gradient[name].a_RI.norm()
            assert (pair.b_OR - alone.gradient[name].b_OR).norm() <= 1e-4 * alone.gradient[name].b_OR.norm()


def test_a_pass_counts_its_padding() -> None:
    assert split_by_padded_tokens([[4], [4], [5], [20], [1]], 10, switch=100) == [[0, 1], [2], [3], [4]]
    assert split_by_padded_tokens([[4, 1], [2], [3]], 12, switch=100) == [[0, 1], [2]]
    assert split_by_padded_tokens([[1], [1], [1]], 100, 2, switch=100) == [[0, 1], [2]]


def test_rows_beyond_a_switch_share_a_pass_with_their_like_only() -> None:
    assert split_by_padded_tokens([[5], [8], [9], [9], [12], [3]], 1000, switch=8) == [[0, 1], [2, 3], [4], [5]]


def test_padding_repeats_a_rows_last_token_and_is_no_target(rows_of_lengths: Callable[..., TokenSet]) -> None:
    rows = rows_of_lengths([3, 5])
    batch = pad([rows.row(0), rows.row(1)])
    ids, supervised = rows.row(0)
    assert batch.input_ids_BT[0].tolist() == [*ids.tolist(), ids[-1], ids[-1]]
    assert (batch.lengths, batch.own_lengths, batch.num_tokens) == ((5, 5), (3, 5), 10)
    first = batch.targets_S[batch.row_of_target_S == 0]
    assert first.tolist() == ids[1:][supervised[1:]].tolist()
    assert batch.input_ids_BT.flatten()[batch.target_index_S + 1].tolist() == batch.targets_S.tolist()


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("token_budget", [1, 60, 1000])
def test_a_rotation_that_looks_at_the_longest_position_does_not_see_padding(
    token_budget: int, rows_of_lengths: Callable[..., TokenSet], tiny: Callable[..., Any]
) -> None:
    changes = {"max_position_embeddings": 12, "rope_parameters": DYNAMIC}
    model, rows = tiny("llama", **changes), rows_of_lengths([5, 30, 9, 12, 13, 30, 21])
    choose_attention(model, "padded")
    row_losses(model, rows, token_budget=token_budget)  # what the longest row left behind is seen by no later one
    found = row_losses(model, rows, token_budget=token_budget).sum_nats
    for index in range(len(rows)):
        with torch.no_grad():  # a model of its own for every row: it keeps the longest length that it has seen
            own = nats_of_each_row_alone(tiny("llama", **changes), rows.select([index]))
        assert found[index] == pytest.approx(float(own), rel=1e-5)


def test_a_model_that_looks_ahead_is_refused_padded_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("llama", vocab_size=64, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.model.layers[0].mlp.register_forward_hook(lambda *parts: parts[2] + parts[2].flip(1).cumsum(1).flip(1))
    choose_attention(model, "padded")
    with pytest.raises(ModelError, match=r"the padded forward of 'llama' differs from the model's own .* another base"):
        output_head(model)


def test_a_model_with_padded_rows_is_not_cut() -> None:
    with pytest.raises(CutError, match=r"model\.attention: expected packed for a model that is cut"):
        cut(build("llama"), 1)
