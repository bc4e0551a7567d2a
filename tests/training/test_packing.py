"""A packed pass is the padded forward without the padding, for every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.data.tokens import TokenSet
from fedloom.errors import ModelError
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models.cut import cut
from fedloom.models.families import resolve_targets
from fedloom.training import packing
from fedloom.training.attention import PACKED, Layout, layout, packed_attention
from fedloom.training.packing import hidden_states, pack, split_by_tokens
from fedloom.training.verified_head import output_head

LENGTHS = [9, 3, 17, 1, 10, 9]
EAGER_IN_FP32 = {"gemma2"}  # transformers' own softmax is in fp32 there, whatever the model's dtype


def rows_list(rows: TokenSet) -> list[Any]:
    return [rows.row(i) for i in range(len(rows))]


def padded_logits(model: Any, rows: TokenSet) -> list[torch.Tensor]:
    """Return the model's own logits of a right-padded batch, per row without the padding."""
    longest = int(rows.lengths.max())
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for i, (ids, _) in enumerate(rows_list(rows)):
        ids_BT[i, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask_BT[i, : len(ids)] = 1
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    return [logits_BTV[i, :n] for i, n in enumerate(rows.lengths)]


def own_logits(family: str, model: Any, rows: TokenSet) -> list[torch.Tensor]:
    """Return the padded logits; row by row in float64 where the model's own softmax makes NaN of its mask there."""
    if family in EAGER_IN_FP32 and model.dtype == torch.float64:
        return [padded_logits(model, rows.select([i]))[0] for i in range(len(rows))]
    return padded_logits(model, rows)


def packed_logits(model: Any, rows: TokenSet) -> tuple[torch.Tensor, ...]:
    batch = pack(rows_list(rows))
    return torch.split(output_head(model).logits(hidden_states(model, batch)), list(batch.lengths))


@pytest.fixture(params=["sample by sample", "in buckets"])
def _either_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in buckets":
        whole = partial(Layout, device=torch.device("cpu"), shares_calls=True)
        monkeypatch.setattr(packing, "layout", lambda lengths, _: whole(tuple(lengths)))


@pytest.mark.usefixtures("_either_layout")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_packed_forward_equals_padded_forward_row_by_row(
    family: str,
    tiny: Callable[..., Any],
    rows_of_lengths: Callable[..., TokenSet],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    model, rows = tiny(family, dtype), rows_of_lengths(LENGTHS)
    allowed = 1e-5 if family in EAGER_IN_FP32 else tolerance
    for packed_TV, padded_TV in zip(packed_logits(model, rows), own_logits(family, model, rows), strict=True):
        torch.testing.assert_close(packed_TV, padded_TV, rtol=allowed, atol=allowed * 10, check_dtype=False)


@pytest.mark.usefixtures("_either_layout")
def test_packed_gradients_equal_padded_gradients(
    family: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = tiny(family), rows_of_lengths(LENGTHS)
    targets = [model.get_submodule(name).weight.requires_grad_() for name in resolve_targets(model)]
    grads = []
    for logits in (packed_logits(model, rows), own_logits(family, model, rows)):
        total = sum(part_TV.square().sum() * (i + 1) for i, part_TV in enumerate(logits))
        grads.append(torch.autograd.grad(total, targets))
    tolerance = 1e-4 if family in EAGER_IN_FP32 else 1e-10
    for packed, padded in zip(*grads, strict=True):
        torch.testing.assert_close(packed, padded, rtol=tolerance, atol=tolerance * float(padded.abs().max()))


@pytest.mark.parametrize("family_name", ["llama", "gpt2", "gemma2"])
def test_packed_forward_in_bfloat16_is_near_that_in_float32(
    family_name: str, tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    rows = rows_of_lengths(LENGTHS)
    exact = torch.cat(packed_logits(tiny(family_name, torch.float32, initializer_range=0.02), rows))
    rounded = torch.cat(packed_logits(tiny(family_name, torch.bfloat16, initializer_range=0.02), rows))
    assert (exact - rounded).norm() < 0.03 * exact.norm()


def test_the_model_attends_its_own_way_again_after_a_packed_pass(
    tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = tiny("llama"), rows_of_lengths(LENGTHS)
    before, implementation = padded_logits(model, rows), model.config._attn_implementation
    hidden_states(model, pack(rows_list(rows)))
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(a, b) for a, b in zip(before, padded_logits(model, rows), strict=True))


def test_the_own_attention_comes_back_after_an_error(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    implementation = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed_attention(model, layout([4])):
        raise ZeroDivisionError
    assert model.config._attn_implementation == implementation


def test_parts_of_a_model_may_be_under_way_at_once_and_end_in_any_order(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    implementation = model.config._attn_implementation
    bottom, top = cut(model, 1)
    first, second = packed_attention(bottom.decoder, layout([4])), packed_attention(top.decoder, layout([4]))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == PACKED
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == implementation


def test_a_forward_without_layout_is_refused_by_name(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    told = "in the packed forward of LlamaAttention, got none"
    with packed_attention(model, layout([4])), pytest.raises(ModelError, match=told):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)


def test_attention_sinks_are_refused_by_name(tiny: Callable[..., Any]) -> None:
    from fedloom.training.attention import attend

    module = tiny("llama").model.layers[0].self_attn
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ModelError, match="attention sinks"):
        attend(module, q, q, q, None, packed_layout=layout([3]), s_aux=torch.zeros(4))


def test_no_graph_below_the_first_adapted_layer(
    tiny: Callable[..., Any], rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = tiny("llama"), rows_of_lengths([5])
    lora = LoRAModel(model, ["model.layers.1.self_attn.q_proj"])
    lora.open([Slot(rank=2, scale=1.0)])
    lora.route_all(0)
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda *parts: seen.append(parts[2].requires_grad))
    assert hidden_states(model, pack(rows_list(rows))).requires_grad
    assert seen == [False]


def test_targets_are_the_supervised_tokens_after_a_rows_first() -> None:
    ids = [np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32), np.array([4], np.int32)]
    supervised = [np.array([True, False, True]), np.array([True, True]), np.array([True])]
    batch = pack(list(zip(ids, supervised, strict=True)))
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.targets_S.tolist() == [7, 9]
    assert batch.target_index_S.tolist() == [1, 3]
    assert batch.row_of_target_S.tolist() == [0, 1]
    assert supervised[0].tolist() == [True, False, True]


def test_parts_keep_the_order_and_the_limits() -> None:
    assert split_by_tokens([4, 4, 4, 20, 1], 8) == [[0, 1], [2], [3], [4]]
    assert split_by_tokens([1, 1, 1], 100, 2) == [[0, 1], [2]]
    assert split_by_tokens([], 8) == []
