"""The table of families agrees with transformers and with peft, and what it cannot serve is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedloom.errors import ModelError
from fedloom.models.families import FAMILIES, decoder_blocks, default_targets, resolve_targets

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "word_embed_proj_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_tables_names_are_the_models(kind: str) -> None:
    model = build(kind)
    parts = decoder_blocks(model)
    assert len(model.get_submodule(parts.blocks)) == 2
    assert model.get_submodule(parts.before[0]) is model.get_input_embeddings()
    assert model.get_submodule(parts.head) is model.get_output_embeddings()
    named = [*parts.before, *parts.after, parts.head]
    outside = [n for n, p in model.named_parameters() if not n.startswith(parts.blocks)]
    assert all(any(name.startswith(f"{part}.") for part in named) for name in outside)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_default_targets_are_pefts_where_peft_has_them(kind: str) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS

    differs = {"phi"}  # peft adds the MLP there; the papers adapt query and value only
    if kind in PEFTS and kind not in differs:
        assert set(default_targets(kind)) == set(PEFTS[kind])
    names = resolve_targets(build(kind))
    assert {name.rpartition(".")[2] for name in names} == set(default_targets(kind))
    assert len(names) == 2 * len(default_targets(kind))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["self_attn.q_proj", "model.layers.1.mlp.up_proj"], 3),
        (["model.layers.0.*.[kv]_proj"], ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]),
        ([r"model\.layers\.\d+\.self_attn\.(q|o)_proj"], 4),
        ("all-linear", 14),
        (["all-linear", "q_proj"], 14),
    ],
)
def test_patterns_choose_layers_in_the_models_order(patterns: Any, expected: list[str] | int) -> None:
    names = resolve_targets(build("llama"), patterns)
    if isinstance(expected, list):
        assert names == expected
    else:
        assert len(names) == expected
    assert names == sorted(set(names), key=[n for n, _ in build("llama").named_modules()].index)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["qproj"], "'qproj' matches no module; choose from the linear layers: q_proj, k_proj"),
        (["("], "matches no module"),
        (
            ["q_proj", "embed_tokens"],
            "expected linear layers, 'embed_tokens' matches 'model.embed_tokens', a Embedding",
        ),
        (["lm_head"], "the output head, which is frozen"),
    ],
)
def test_patterns_that_cannot_be_adapted_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message.replace("(", r"\(")):
        resolve_targets(build("llama"), patterns)


def test_a_family_without_query_and_value_needs_named_targets() -> None:
    with pytest.raises(ModelError, match="no default is known for 'mamba'"):
        resolve_targets(build("mamba"))
    model = build("mamba")
    model.backbone.layers = model.backbone.layers[:1]
    with pytest.raises(ModelError, match=r"expected one list of 2 blocks beside the embeddings, .* \('mamba'\)"):
        decoder_blocks(model)
    assert resolve_targets(build("mamba"), ["in_proj"])


def test_a_model_unlike_its_familys_table_is_refused() -> None:
    model = build("llama")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ModelError, match=r"expected 2 blocks at 'model\.layers'"):
        decoder_blocks(model)
    model = build("llama")
    model.set_output_embeddings(nn.Linear(1, 1))
    model.other, model.lm_head = model.lm_head, nn.Identity()
    model.get_output_embeddings = lambda: model.other
    with pytest.raises(ModelError, match="expected the output head"):
        decoder_blocks(model)
