"""Tiny random models for tests: one of nn.Linear, one of GPT-2's transposed Conv1D."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_model(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        if family == "gpt2":
            config = GPT2Config(
                vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
            return GPT2LMHeadModel(config).double().eval()
        llama = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(llama).double().eval()


TARGETS = {
    "llama": [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("q_proj", "v_proj")],
    "gpt2": [f"transformer.h.{i}.attn.c_attn" for i in range(2)],
}
