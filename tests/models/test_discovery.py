"""A family that no table names is cut, adapted and checked by what its model shows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedloom.errors import CutError, ModelError
from fedloom.models.cut import cut, verify_cut
from fedloom.models.discovery import discovered_parts, discovered_targets
from fedloom.models.families import FAMILIES, decoder_blocks, resolve_targets
from fedloom.models.threads import BUILDING

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
UNLISTED = (
    *("mixtral", "qwen3_moe", "olmoe", "starcoder2", "glm4", "exaone4", "ernie4_5", "cohere2", "olmo3", "ministral3"),
    *("phimoe", "gpt_bigcode", "granitemoe", "seed_oss", "olmo"),
)


def build(kind: str) -> Any:
    with BUILDING, torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SIZES)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", UNLISTED)
def test_a_family_without_a_line_is_cut_everywhere(kind: str) -> None:
    assert kind not in FAMILIES
    model = build(kind)
    for boundaries in [(1,), (2,), (1, 2)]:
        verify_cut(model, cut(model, *boundaries))
    assert resolve_targets(model)


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - {"opt"}))  # it defines its last norm ahead of its blocks
def test_what_is_found_is_what_the_table_says(kind: str) -> None:
    sizes = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    found, table = discovered_parts(model), decoder_blocks(model)
    assert found is not None
    assert (found.blocks, found.head, found.before[0]) == (table.blocks, table.head, table.before[0])
    # The table also lists the rotary embedding, which has no parameters and stays in every part.
    with_parameters = {name for name in table.before if any(True for _ in model.get_submodule(name).parameters())}
    assert set(found.before) == with_parameters
    assert set(found.after) == set(table.after)
    assert set(discovered_targets(model)) == set(table.targets)


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen3_moe", "starcoder2", "gpt_bigcode", "falcon", "bloom", "mpt", "dbrx"]
)
def test_targets_that_are_found_are_pefts(kind: str) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS

    if kind not in PEFTS:
        pytest.skip(f"peft has no default for {kind}")
    config = transformers.AutoConfig.for_model(kind)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert set(discovered_targets(model)) == set(PEFTS[kind])
    assert resolve_targets(model)


def test_a_forward_that_does_more_than_its_blocks_cannot_be_cut() -> None:
    model = build("starcoder2")
    own = type(model.model).forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = own(model.model, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 1.0
        return output

    parts = cut(model, 1)
    model.model.forward = shifted
    with pytest.raises(CutError, match="starcoder2 cannot be cut, the outputs differ by"):
        verify_cut(model, parts)


def test_two_lists_of_blocks_are_no_guess() -> None:
    model = build("starcoder2")
    model.model.others = nn.ModuleList([nn.Identity() for _ in range(3)])
    with pytest.raises(ModelError, match="expected one list of 3 blocks beside the embeddings"):
        decoder_blocks(model)


def test_what_never_sees_the_text_is_not_adapted_unless_it_is_named() -> None:
    config = transformers.AutoConfig.for_model("gemma3", text_config=SIZES, vision_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for patterns in (None, ["all-linear"]):
        names = resolve_targets(model, patterns)
        assert names
        assert not [name for name in names if "vision_tower" in name]
    assert resolve_targets(model, ["*.vision_tower.*.q_proj"])


def test_attention_to_what_another_model_has_read_is_not_adapted() -> None:
    sizes = {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 64}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("bart", **sizes))
    for patterns in (None, ["all-linear"]):
        names = resolve_targets(model, patterns)
        assert [name for name in names if "self_attn.q_proj" in name]
        assert not [name for name in names if "encoder_attn" in name]


def test_a_family_that_states_no_number_of_blocks_is_refused_in_one_line() -> None:
    model = build("starcoder2")
    model.config = transformers.AutoConfig.for_model("blt")
    with pytest.raises(ModelError, match="expected one list of 0 blocks"):
        decoder_blocks(model)


class Router(nn.Linear):
    """A linear layer by class that returns something else."""

    def forward(self, x: torch.Tensor) -> Any:
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class SameLinear(nn.Linear):
    """A linear layer that is written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


def test_only_what_computes_as_a_linear_layer_is_adapted() -> None:
    model = build("starcoder2")
    block = model.model.layers[0]
    block.router, block.same, block.scaled = Router(8, 4), SameLinear(8, 4), SameLinear(8, 4)
    block.scaled.forward = lambda x: 2 * nn.functional.linear(x, block.scaled.weight, block.scaled.bias)  # type: ignore[method-assign]
    names = resolve_targets(model, "all-linear")
    found = [name for name in ("router", "same", "scaled") if f"model.layers.0.{name}" in names]
    assert found == ["same"]
    with pytest.raises(ModelError, match="a Router"):
        resolve_targets(model, ["router"])
    assert list(itertools.chain(resolve_targets(model, ["same"]))) == ["model.layers.0.same"]
