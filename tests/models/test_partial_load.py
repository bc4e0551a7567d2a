"""A part of a base is the whole one's, to the bit, and is held against the same checks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from split.split_cases import CONFIGS, DEPTH
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedloom.errors import CutError, ModelError
from fedloom.models.cut import part_of, top_of
from fedloom.models.load import Dtype, find_base, load_base
from fedloom.models.partial_load import client_part, server_part, skeleton

IDS_BT = torch.tensor([[5, 9, 3, 44, 7, 210, 60, 8, 13]])


def saved(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a family's random model over bytes."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        config = AutoConfig.for_model(case.split(",")[0], **CONFIGS[case] | {"vocab_size": 256})
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float32, "bfloat16")]
)
@pytest.mark.parametrize("case", ["llama, tied", "gpt2, untied", "gemma3_text"])
@torch.no_grad()
def test_both_sides_of_a_cut_base_have_the_bits_of_the_whole_one(
    case: str, stored: torch.dtype, dtype: Dtype, tmp_path: Path
) -> None:
    saved(case, tmp_path, stored)
    whole = load_base(tmp_path, tokenizer="bytes", dtype=dtype, device="cpu")
    found = find_base(tmp_path, tokenizer="bytes", device="cpu")
    client, server = client_part(found, 1, 1, dtype=dtype), server_part(found, 1, 1, dtype=dtype)
    assert found.revision_hash == whole.revision_hash
    hidden = expected = IDS_BT
    for mine, cut_of in ((client, part_of), (server, part_of), (client, top_of)):
        bounds = {id(client): (0, 1), id(server): (1, DEPTH - 1)}[id(mine)] if cut_of is part_of else (DEPTH - 1,)
        hidden, expected = cut_of(mine, *bounds)(hidden), cut_of(whole.model, *bounds)(expected)
        assert hidden.dtype == whole.dtype
        assert torch.equal(hidden, expected)
    for part in (client, server):
        assert {p.device.type for p in part.parameters()} == {"cpu"}
        assert not any(p.requires_grad for p in part.parameters())


LAYOUTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"moe_intermediate_size": 12, "num_key_value_heads": 4},
    },
    "gemma3": {},
}


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
@torch.no_grad()
def test_a_base_that_is_stored_in_another_layout_is_read_in_parts_to_the_bit(kind: str, tmp_path: Path) -> None:
    text = {
        **{"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "pad_token_id": 0},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32},
    }
    sight = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    given = {"text_config": text, "vision_config": sight | {"image_size": 28}} if kind == "gemma3" else text
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given | LAYOUTS[kind]))
        for name, buffer in model.named_buffers():  # a router's bias, which no gradient trains, is stored too
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand_like(buffer))
    model.save_pretrained(tmp_path)
    whole = load_base(tmp_path, tokenizer="bytes", device="cpu").model
    found = find_base(tmp_path, tokenizer="bytes", device="cpu")
    client, server = client_part(found, 1, None), server_part(found, 1, None)
    hidden = part_of(client, 0, 1)(IDS_BT)
    assert torch.equal(hidden, part_of(whole, 0, 1)(IDS_BT))
    assert torch.equal(top_of(server, 1)(hidden), top_of(whole, 1)(hidden))
    assert torch.equal(server.get_output_embeddings().weight, whole.get_output_embeddings().weight)  # type: ignore[operator]


def test_a_part_is_not_quantised_and_a_cut_outside_the_base_is_refused(tmp_path: Path) -> None:
    found = find_base(saved("llama", tmp_path), tokenizer="bytes", device="cpu")
    with pytest.raises(ModelError, match=r"model\.quantization: expected none for a part of a base, got 8bit; set"):
        client_part(found, 1, None, quantization="8bit")
    for load in (client_part, server_part):
        with pytest.raises(CutError, match="expected 1 to 2"):
            load(found, 3, 1)


def test_a_skeleton_has_every_name_and_shape_and_no_weight(tmp_path: Path) -> None:
    found = find_base(saved("llama", tmp_path), tokenizer="bytes", device="cpu")
    whole = {name: tuple(p.shape) for name, p in load_base(tmp_path, tokenizer="bytes").model.named_parameters()}
    bare = dict(skeleton(found.path).named_parameters())
    assert {name: tuple(p.shape) for name, p in bare.items()} == whole
    assert all(p.is_meta for name, p in bare.items() if p.ndim == 2)


def test_laying_a_base_out_leaves_the_layers_of_other_threads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, made = find_base(saved("llama", tmp_path), tokenizer="bytes", device="cpu"), list[Any]()
    build = AutoModelForCausalLM.from_config

    def meanwhile(*args: Any, **named: Any) -> Any:
        other = threading.Thread(target=lambda: made.append(nn.Linear(3, 4)))
        other.start()
        other.join()
        return build(*args, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", meanwhile)
    skeleton(found.path)
    assert [p.is_meta for p in made[0].parameters()] == [False, False]
