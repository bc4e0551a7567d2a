"""A row's numbers do not depend on its neighbours where the rotary embedding looks at the longest position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedloom.data.tokens import TokenSet
from fedloom.errors import ModelError
from fedloom.models.cut import cut
from fedloom.split.split_step import run_bottom, run_part
from fedloom.training.packing import hidden_states, pack
from fedloom.training.rotation import NEVER, check_rotated_apart, shortest_switch
from fedloom.training.row_losses import row_losses
from fedloom.training.verified_head import output_head

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 12,
    "partial_rotary_factor": 1.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MSCALES = {"short_mscale": 1.0, "long_mscale": 1.3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": (
        "phi3",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 12, "rope_parameters": LONGROPE},
    ),
    "phimoe": (
        "phimoe",
        {"max_position_embeddings": 64, "num_local_experts": 2, "rope_parameters": LONGROPE | MSCALES},
    ),
    "dynamic llama": ("llama", {"max_position_embeddings": 12, "rope_parameters": DYNAMIC}),
}
SWITCH = 12
LENGTHS = [5, 30, 9, 12, 13, 30, 21]


def build(kind: str, **changes: Any) -> Any:
    name, own = KINDS[kind]
    config = transformers.AutoConfig.for_model(name, **(SIZES | own | changes))
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model if name == "phimoe" else model.double()  # its experts are computed in no wider type


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_switch_is_found(kind: str) -> None:
    assert shortest_switch(build(kind)) == SWITCH


def test_a_usual_rotary_embedding_has_no_switch() -> None:
    assert shortest_switch(build("dynamic llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4})) == NEVER


@pytest.mark.parametrize("token_budget", [1, 60, 1000])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_rows_loss_is_the_models_own_whatever_it_is_packed_with(
    kind: str, token_budget: int, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = build(kind), rows_of_lengths(LENGTHS)
    found = row_losses(model, rows, token_budget=token_budget).sum_nats
    for index in range(len(rows)):
        # A model of its own for every row: dynamic NTK keeps the longest length it has seen.
        ids, supervised = (torch.from_numpy(part.copy()) for part in rows.row(index))
        with torch.no_grad():
            logits_TV = build(kind)(input_ids=ids.long()[None], use_cache=False).logits[0]
        nats = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:].long(), reduction="none")[supervised[1:]]
        assert found[index] == pytest.approx(float(nats.sum()), rel=1e-5), LENGTHS[index]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_parts_of_a_split_model_rotate_a_row_as_the_whole_does(
    kind: str, rows_of_lengths: Callable[..., TokenSet]
) -> None:
    model, rows = build(kind), rows_of_lengths(LENGTHS)
    batch = pack([rows.row(index) for index in range(len(rows))])
    with torch.no_grad():
        bottom, top = cut(model, 1)
        hidden_TD = run_part(top, run_bottom(bottom, batch), batch.position_ids_T, batch.layout)
        torch.testing.assert_close(hidden_TD, hidden_states(model, batch), rtol=1e-4, atol=1e-5)


def test_the_models_own_forward_is_put_back(rows_of_lengths: Callable[..., TokenSet]) -> None:
    model = build("phi3")
    row_losses(model, rows_of_lengths(LENGTHS), token_budget=1000)
    assert "forward" not in vars(model.model.rotary_emb)


def test_the_probe_finds_a_rotation_that_still_looks_at_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("phi3")
    check_rotated_apart(model)
    monkeypatch.setattr("fedloom.training.rotation._by_length", lambda _, __, ___, original, *args: original(*args))
    with pytest.raises(ModelError, match=r"expected model\.rotary_emb to rotate a row by its own length"):
        output_head(model)


def test_rows_on_one_side_of_the_switch_cost_one_call(rows_of_lengths: Callable[..., TokenSet]) -> None:
    model, calls = build("phi3"), []
    own = type(model.model.rotary_emb).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(self, *args, **kwargs)

    shortest_switch(model)
    rows = rows_of_lengths([5, 9, 12])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.model.rotary_emb), "forward", counted)
        hidden_states(model, pack([rows.row(index) for index in range(3)]))
    assert len(calls) == 1
    assert np.array_equal(rows.lengths, [5, 9, 12])
