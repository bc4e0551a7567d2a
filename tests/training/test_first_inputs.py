"""Inputs of the first block: known of every token where nothing else tells, and of no other layer."""

from __future__ import annotations

import torch
from tiny_models import TARGETS, tiny_model

from fedloom.lora.layer import LoRAModel
from fedloom.training.first_inputs import inputs_of_tokens


def test_a_llamas_first_layers_read_the_normalised_embedding_and_no_later_one_is_known() -> None:
    lora = LoRAModel(tiny_model("llama"), TARGETS["llama"])
    known = inputs_of_tokens(lora)
    assert list(known) == TARGETS["llama"][:2]
    decoder = lora.model.model
    wanted = decoder.layers[0].input_layernorm(decoder.embed_tokens.weight)  # type: ignore[union-attr, operator, index]
    for inputs in known.values():
        torch.testing.assert_close(inputs, wanted.detach().float())


def test_where_positions_are_added_to_the_embeddings_none_is_known() -> None:
    assert inputs_of_tokens(LoRAModel(tiny_model("gpt2"), TARGETS["gpt2"])) == {}
