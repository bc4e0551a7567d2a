"""Tiny decoders of each family, built from their configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedloom.data.tokens import TokenSet
from fedloom.lora.layer import LoRAModel
from fedloom.models.families import resolve_targets
from fedloom.models.fused import fuse_operators

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"sliding_window": 5}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", WINDOWED),
    "qwen2": ("Qwen2Config", WINDOWED | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        WINDOWED | {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": ("Gemma3TextConfig", WINDOWED | {"head_dim": 8}),
    "granite": ("GraniteConfig", GROUPED | {"logits_scaling": 3.0}),
    "olmo2": ("Olmo2Config", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 0.3}),
    "phi": ("PhiConfig", SIZES),
    "phi3": ("Phi3Config", WINDOWED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "opt": ("OPTConfig", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.3}),
}


def build(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Build a frozen tiny model, its operators as those of a loaded base; the same weights every time."""
    config_class, values = CONFIGS[family]
    config = getattr(transformers, config_class)(**(values | changes))
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return fuse_operators(model.eval().requires_grad_(False))


def random_rows(lengths: list[int], seed: int = 0) -> TokenSet:
    """Draw rows of these lengths, about half of the tokens supervised, the last one always."""
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(1, VOCABULARY, n), rng.random(n) < 0.5) for n in lengths]
    for _, supervised in rows:
        supervised[-1] = True
    return TokenSet.from_rows(rows)


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    """Return each family's name in turn."""
    return str(request.param)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """Return ``build``, since tests cannot import each other."""
    return build


@pytest.fixture
def rows_of_lengths() -> Callable[..., TokenSet]:
    """Return ``random_rows``."""
    return random_rows


@pytest.fixture
def llama_lora() -> LoRAModel:
    """Return a wrapped Llama in float64."""
    model = build("llama")
    return LoRAModel(model, resolve_targets(model))


@pytest.fixture
def placed_lora(device: str) -> LoRAModel:
    """Return a wrapped Llama in float64 on every device in turn."""
    model = build("llama").to(device)
    return LoRAModel(model, resolve_targets(model))
