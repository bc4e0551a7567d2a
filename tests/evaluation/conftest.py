"""Tiny models from a config with random weights, and the tokenizer of bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedloom.data.tokenizer import byte_tokenizer


def tiny_model(kind: str, **settings: Any) -> Any:
    """Build a byte model of a family in float64, weights drawn from one named stream."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    if kind == "gpt2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        size |= {"intermediate_size": 48, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=256, bos_token_id=0, eos_token_id=0, pad_token_id=0, **size, **settings
    )
    model = AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()
