"""Tiny random models of every family that can be cut, and rows of ragged lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.models.families import resolve_targets
from fedloom.split.parties import SplitParties
from fedloom.split.plan import SplitPlan
from fedloom.training.cohort_round import LocalTraining

VOCABULARY, DEPTH = 61, 4
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": DEPTH,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_SLIDING = {"sliding_window": 4, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2, untied": {**_GPT2, "tie_word_embeddings": False},
    "llama": _COMMON,
    "llama, tied": {**_COMMON, "tie_word_embeddings": True},
    "mistral": {**_COMMON, "sliding_window": 4},
    "qwen2": {**_COMMON, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {**_COMMON, "head_dim": 8},
    "gemma": {**_COMMON, "head_dim": 8},
    "gemma2": {**_COMMON, **_SLIDING},
    "gemma3_text": {**_COMMON, **_SLIDING},
    "phi": _COMMON,
    "phi3": _COMMON,
    "exaone4": {**_COMMON, **_SLIDING},
    "mixtral": {**_COMMON, "num_local_experts": 4},
}
FAMILIES = list(CONFIGS)


def random_model(case: str) -> Any:
    """Build a family's model with random weights."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        config = AutoConfig.for_model(case.split(",")[0], **CONFIGS[case])
        return AutoModelForCausalLM.from_config(config).eval()


def random_rows(num_rows: int, seed: int = 0) -> TokenSet:
    """Draw rows of 5 to 14 tokens, the last half supervised."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 15, num_rows)
    return TokenSet.from_rows((rng.integers(3, VOCABULARY, n), np.arange(n) >= n // 2) for n in lengths)


def random_adapter(lora: LoRAModel, rank: int, seed: int) -> Adapter:
    """Draw an adapter whose product is not zero."""
    fresh = fresh_adapter(lora.shapes, rank, seed, "test")
    generator = torch.Generator().manual_seed(seed)
    return Adapter({n: Pair(torch.randn(p.b_OR.shape, generator=generator) * 0.1, p.a_RI) for n, p in fresh.items()})


def wrapped(case: str, device: str = "cpu") -> LoRAModel:
    """Wrap a random model's default targets."""
    model = random_model(case).to(device)
    return LoRAModel(model, resolve_targets(model))


class SGD:
    """Plain gradient descent in the place of AdamW, for laws about gradients."""

    def __init__(self, factors: Any, plan: SplitPlan, round: int, state: Any) -> None:
        self.factors, self.rate = factors, plan.training.learning_rate

    def step(self) -> float:
        for factor in self.factors.values():
            factor.data -= self.rate * factor.grad
        return self.rate

    def export_state(self) -> dict[str, torch.Tensor]:
        return {}


PLAN = SplitPlan(
    seed=5,
    num_steps=4,
    aggregate_every=2,
    cut_layers=(2, 2, 2),
    ranks=(3, 3, 3),
    scales=(2.0, 2.0, 2.0),
    server_rank=3,
    server_scale=2.0,
    num_rows=(7, 5, 6),
    training=LocalTraining(learning_rate=0.05, batch_size=4),
    wire_dtype="fp32",
    gradient_wire_dtype="fp32",
)

SetUp = Callable[..., tuple[LoRAModel, SplitParties, list[TokenSet]]]
