"""Tiny random models of families that cannot run packed, and one that can either way."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers

from fedloom.models.row_attention import Attention, choose_attention
from fedloom.models.threads import BUILDING

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
UNPACKABLE: dict[str, dict[str, Any]] = {
    "bloom": {},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "codegen": {"rotary_dim": 4},
    "falcon": {"alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "stablelm": {},
    "nemotron": {},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 4,
        "block_types": ["recurrent", "attention"],
        "logits_soft_cap": 2.0,
    },
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5, **MAMBA_2},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}
"""Family by ``model_type``, with what its configuration needs beside ``SIZES``."""
TARGETS = {
    "recurrent_gemma": ["q_proj", "linear_x", "down_proj"],
    "mamba2": ["in_proj"],
    "rwkv": ["key", "value"],
}
"""What to adapt where a family has no usual projections."""


def build(kind: str, attention: Attention = "padded", dtype: torch.dtype = torch.float32) -> Any:
    """Return a frozen two-block model over bytes whose rows pass as said; the same weights every time."""
    unset = {"num_key_value_heads"} if kind == "falcon" else set()
    sizes = {name: value for name, value in SIZES.items() if name not in unset} | UNPACKABLE.get(kind, {})
    with BUILDING, torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.random.default_generator.manual_seed(7)
        config = transformers.AutoConfig.for_model(kind, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Added to what each family draws, so that norms and states stay in their range and no attention is even.
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    choose_attention(model, attention)
    return model
