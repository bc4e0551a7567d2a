"""A tiny random decoder of every kind that the installed transformers knows.

A configuration is shrunk by the names of its sizes, wherever they are nested. Lists with an entry per block keep one
entry of each sort, so a tiny model has every sort of layer. What no name tells stands in ``SPECIAL``.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedloom.models.threads import BUILDING

NUM_BLOCKS = 4
VOCABULARY = 256
CONTEXT = 128

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH, INNER, EXPERTS = 32, 4, 2, 8, 48, 4

_BLOCKS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "num_blocks", "depth", "num_global_layers", "num_layers_per_stack"),
)
_NAMES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (NUM_BLOCKS, _BLOCKS),
    (
        VOCABULARY,
        (
            *(
                "vocab_size",
                "text_vocab_size",
                "vocab_size_per_layer_input",
                "decoder_vocab_size",
                "unpadded_vocab_size",
            ),
        ),
    ),
    (WIDTH, ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embedding_dim", "emb_dim", "lru_width")),
    (
        HEADS,
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *(
                "encoder_attention_heads",
                "attention_heads",
                "num_encoder_attention_heads",
                "num_decoder_attention_heads",
            ),
        ),
    ),
    (
        KEY_HEADS,
        (
            *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_query_groups", "num_kv_shared_layers"),
            *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
        ),
    ),
    (
        HEAD_WIDTH,
        (
            *(
                "head_dim",
                "d_kv",
                "d_head",
                "kv_channels",
                "attention_head_size",
                "qk_rope_head_dim",
                "qk_nope_head_dim",
            ),
            *("v_head_dim", "index_head_dim", "rotary_dim"),
        ),
    ),
    (
        2 * HEAD_WIDTH,
        (
            *("qk_head_dim", "sliding_window", "attention_window_size", "local_attention", "window_size"),
            "local_attention_window_len",
        ),
    ),
    (EXPERTS, ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num")),
    (
        1,
        (
            *("n_group", "num_group", "num_expert_group", "topk_group", "num_nextn_predict_layers"),
            *("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
        ),
    ),
    (
        CONTEXT,
        (
            *("max_position_embeddings", "n_positions", "max_target_positions", "context_length", "model_max_length"),
            "max_seq_len",
        ),
    ),
    (0.15, ("initializer_range", "init_std", "embed_init_std")),
    (True, ("is_decoder",)),
)
_SIZES = {name: value for value, names in _NAMES for name in names}
"""Tiny values by the name of a size. Weights are larger than usual, so that all that a block does shows."""

_MAY_BE_UNSET = ("sliding_window", "num_kv_shared_layers", "rotary_dim", "qk_head_dim", "vocab_size_per_layer_input")
"""Sizes that a kind may do without: None there is no default that the model cannot be built with."""

_CAPS = {"heads": HEADS, "groups": 2, "rank": HEAD_WIDTH, "experts": EXPERTS}
"""The most of a size that no line above names, by the end of its name; any other width or length has ``WIDTH``."""

_GEMMA4 = {"per_layer_config": {"01": {"head_dim": 2 * HEAD_WIDTH}, "03": {"head_dim": 2 * HEAD_WIDTH}}}
_DOTS3 = {"per_layer_config": {}, "head_dim": 2 * HEAD_WIDTH}
_QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_WIDTH, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2, "ngram_vocab_size_base": VOCABULARY, "split_ngram_parts": 1},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4},
    "mamba2": {"head_dim": 2 * WIDTH // HEADS},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24], "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS},
    "zamba2": {
        **{"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS, "mamba_headdim": 16},
        **{"n_mamba_heads": HEADS, "hybrid_layer_ids": [1, 3]},
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What the names do not tell, by kind."""

DRAFTS = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"), "it drafts for another model, whose keys and values it needs"
)
"""Kinds that cannot run alone, with the reason."""


def tiny_config(kind: str) -> Any:
    """Return the configuration of a tiny decoder of that kind."""
    config_class = CONFIG_MAPPING[kind]
    return config_class(**_merged(shrunk(config_class()), SPECIAL.get(kind, {})))


def tiny_decoder(kind: str) -> Any:
    """Return a random float32 decoder of that kind, the same at every call."""
    config = tiny_config(kind)
    with BUILDING, torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        kept = model.state_dict()
        for name, buffer in model.named_buffers():  # a checkpoint has its own, such as the bias of a router
            if name in kept and buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
        return model


def shrunk(config: Any) -> dict[str, Any]:
    """Return the arguments that make a tiny configuration of the same sort."""
    found: dict[str, Any] = {}
    values = config.to_dict()
    for name, value in values.items():
        if name in (config.sub_configs or {}) and getattr(config, name) is not None:
            found[name] = shrunk(getattr(config, name))
        elif (small := shrunk_value(name, value)) != value:
            found[name] = small
    if "qk_nope_head_dim" in values:  # each head has its own part of the compressed keys and values
        found["num_key_value_heads"] = HEADS
    return found | rows_of_blocks(config)


def shrunk_value(name: str, value: Any) -> Any:
    """Return a size as it is in a tiny decoder, and any other value as it is."""
    if name in _SIZES and not isinstance(value, list | dict):
        is_unset = value is None and name in _MAY_BE_UNSET
        return value if is_unset or (value == 0 and value is not False) else _SIZES[name]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name.endswith(("token_id", "token_index")):
        return min(value, VOCABULARY - 1)
    if (cap := next((cap for end, cap in _CAPS.items() if name.endswith(end)), None)) is not None:
        return min(value, cap)
    if "intermediate" in name or "ffn" in name or name in ("n_inner", "dff", "d_inner", "d_ff"):
        return min(value, INNER)
    ends = ("dim", "size", "width", "length", "_d_ssm", "channels", "group_vocab", "size_global")
    return min(value, WIDTH) if name.endswith(ends) else value


def rows_of_blocks(config: Any) -> dict[str, Any]:
    """Return each list with an entry per block, cut to one block of every sort."""
    values = config.to_dict()
    counts = {values[name] for name in _BLOCKS if isinstance(values.get(name), int)}
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and len(value) in counts and len(value) > NUM_BLOCKS
    }
    if not lists:
        return {}
    longest = max(map(len, lists.values()))
    lists = {name: value for name, value in lists.items() if len(value) == longest}
    sorts = list({repr(row): row for row in zip(*lists.values(), strict=True)}.values())
    chosen = [sorts[place % len(sorts)] for place in range(NUM_BLOCKS)]
    return {name: [row[column] for row in chosen] for column, name in enumerate(lists)}


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merged(values[name], others[name]) for name in values.keys() & others if name.endswith("_config")}
    return values | others | both
