"""What is written is what stock peft reads on the base at hand, in the families whose targets peft rewrites too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import load_peft, save_peft
from fedloom.models.families import resolve_targets
from fedloom.models.stock_peft import not_read, taken_for_experts
from fedloom.models.threads import BUILDING

SIZES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "deepseek_v3": DEEPSEEK | GROUPS,
    "deepseek_v2": DEEPSEEK | GROUPS,
    "glm4_moe": GROUPS,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "mixtral": {},
    "olmoe": {},
}


def build(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **(SIZES | KINDS[kind]), pad_token_id=0)
    with BUILDING, torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_adapter(shapes: dict[str, tuple[int, int]], ranks: tuple[int, ...] = (2,)) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for place, (name, (num_out, num_in)) in enumerate(sorted(shapes.items())):
        rank = min(ranks[place % len(ranks)], num_out, num_in)
        b_OR = torch.randn(num_out, rank, generator=generator) * 0.2
        pairs[name] = Pair(b_OR, torch.randn(rank, num_in, generator=generator) * 0.2)
    return Adapter(pairs)


@pytest.mark.parametrize("ranks", [(2,), (3, 2)], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_stock_peft_gives_our_logits_with_every_linear_layer_adapted(
    kind: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    lora = LoRAModel(build(kind), resolve_targets(build(kind), "all-linear"))
    adapter, ids_BT = random_adapter(lora.shapes, ranks), torch.arange(3, 12)[None]
    save_peft(
        adapter, tmp_path, base_name="x", dropout=0.1, parameters=taken_for_experts(lora.model.config, lora.shapes)
    )
    assert not_read(tmp_path, lora.model.config) is None
    lora.set_side(adapter)
    stock = PeftModel.from_pretrained(build(kind), str(tmp_path)).eval()
    with torch.no_grad():
        ours, theirs = lora.model(input_ids=ids_BT).logits, stock(input_ids=ids_BT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    read = load_peft(tmp_path)
    for name, pair in adapter.items():
        torch.testing.assert_close(read[name].delta(), pair.delta(), rtol=1e-5, atol=1e-6)


def test_what_stock_peft_drops_is_named(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    lora = LoRAModel(model, resolve_targets(model, "all-linear"))
    save_peft(random_adapter(lora.shapes), tmp_path, base_name="x")
    told = not_read(tmp_path, model.config) or ""
    assert "does not load 6 of 16 modules" in told
    assert "model.layers.0.mlp.down_proj" in told
    assert "--merge" in told


def test_an_adapter_of_another_shape_is_named(tmp_path: Path) -> None:
    model = build("llama")
    save_peft(random_adapter({"model.layers.0.self_attn.q_proj": (16, 8)}), tmp_path, base_name="x")
    assert "does not load 1 of 1 modules" in (not_read(tmp_path, model.config) or "")


def test_dense_families_are_written_as_before() -> None:
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]
    assert not taken_for_experts(build("llama").config, names)
    assert taken_for_experts(build("qwen3_moe").config, names) == set(names)


def test_an_export_says_what_stock_peft_would_drop(
    tmp_path: Path, settings_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedloom
    from fedloom.results.export import export_adapter

    build("deepseek_v3").save_pretrained(tmp_path / "base")
    settings = settings_for(model__base=str(tmp_path / "base"), model__target_modules=["all-linear"], method__ranks=1)
    fedloom.run(settings, tmp_path / "run")
    exported = export_adapter(tmp_path / "run", tmp_path / "exported")
    assert exported.unread is None
    written = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.down_proj.weight" in written["target_parameters"]
    monkeypatch.setattr("fedloom.results.export.parameters_of", lambda _: frozenset())
    dropped = export_adapter(tmp_path / "run", tmp_path / "other")
    assert "does not load 6 of 16 modules" in dropped.lines()[-1]
    assert "does not load 6 of 16 modules" in (tmp_path / "other" / "README.md").read_text()
