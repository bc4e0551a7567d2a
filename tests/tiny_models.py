"""Tiny random models for tests: one of nn.Linear, one of GPT-2's transposed Conv1D."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

TARGETS = {
    "llama": [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("q_proj", "v_proj")],
    "gpt2": [f"transformer.h.{i}.attn.c_attn" for i in range(2)],
}


def tiny_model(family: str) -> PreTrainedModel:
    """Return a two-block float64 model over 50 tokens."""
    return seeded_model(family, vocab_size=50).double().eval()


def seeded_model(family: str, *, vocab_size: int, num_positions: int = 256) -> PreTrainedModel:
    """Return a two-block model, the same at every call."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        if family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=vocab_size,
                    n_positions=num_positions,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    resid_pdrop=0,
                    embd_pdrop=0,
                    attn_pdrop=0,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                max_position_embeddings=num_positions,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
