"""What is written for a tool is what that tool's own rule makes the adapter again; what it cannot take is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedloom.cli.app import exit_code
from fedloom.errors import AdapterError
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import load_peft, save_peft
from fedloom.results.export import export_adapter
from fedloom.seeding import torch_stream

SHAPES = {f"model.layers.{layer}.self_attn.{leaf}": (6, 8) for layer in range(6) for leaf in ("v_proj", "q_proj")}


def written(folder: Path, ranks: tuple[int, ...], scale: float = 2.0, **how: Any) -> Adapter:
    """Write an adapter whose modules take the ranks in turn, and return it."""
    draw, pairs = torch_stream(1, "served"), {}
    for position, (name, (num_out, num_in)) in enumerate(SHAPES.items()):
        rank = ranks[position % len(ranks)]
        pairs[name] = Pair(torch.randn(num_out, rank, generator=draw), torch.randn(rank, num_in, generator=draw))
    save_peft(Adapter(pairs), folder, base_name="org/base", scale=scale, **how)
    return Adapter(pairs)


def vllm_scale(config: dict[str, Any], _: torch.Tensor) -> float:
    """As ``PEFTHelper`` has it: one for the file, ``lora_alpha / r``; patterns are fields that it does not know."""
    return float(config["lora_alpha"]) / float(config["r"])


def llama_scale(config: dict[str, Any], b_OR: torch.Tensor) -> float:
    """As ``get_scale`` has it: the one alpha that the converter keeps, over the tensor's own rank."""
    return float(config["lora_alpha"]) / b_OR.shape[1]


def as_served(folder: Path, scale: Callable[[dict[str, Any], torch.Tensor], float]) -> dict[str, torch.Tensor]:
    """Return every module's product as a tool adds it to the weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, b_OR in tensors.items():
        if ".lora_B." in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            found[module] = scale(config, b_OR) * b_OR @ tensors[key.replace(".lora_B.", ".lora_A.")]
    return found


def is_served_right(folder: Path, scale: Callable[[dict[str, Any], torch.Tensor], float], wanted: Adapter) -> bool:
    found = as_served(folder, scale)
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name], pair.delta(), rtol=1e-5, atol=1e-5) for name, pair in wanted.items()
    )


@pytest.mark.parametrize(("tool", "scale"), [("vllm", vllm_scale), ("gguf", llama_scale)])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_tool_of_one_scale_serves_modules_of_different_ranks(
    tool: str, scale: Callable[..., float], rank: int | None, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "mixed", (4, 2, 1))
    exported = export_adapter(tmp_path / "mixed", tmp_path / "out", tool=tool, rank=rank)
    assert is_served_right(tmp_path / "out", scale, adapter)
    assert exported.rank_error < 1e-4
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 4, {}, {})


def test_the_emulated_rules_tell_a_file_of_patterns_from_one_without(tmp_path: Path) -> None:
    adapter = written(tmp_path / "mixed", (4, 2, 1))
    assert not is_served_right(tmp_path / "mixed", llama_scale, adapter)
    export_adapter(tmp_path / "mixed", tmp_path / "plain")
    assert not is_served_right(tmp_path / "plain", llama_scale, adapter)
    export_adapter(tmp_path / "mixed", tmp_path / "peft", tool="peft")
    assert load_peft(tmp_path / "peft").ranks == adapter.ranks


@pytest.mark.parametrize(("rank", "needed"), [(1, 8), (8, 8), (9, 16), (24, 32), (300, 320), (512, 512)])
def test_vllm_is_told_the_smallest_rank_that_it_allows(rank: int, needed: int, tmp_path: Path) -> None:
    pair = Pair(torch.ones(2, rank), torch.ones(rank, 2))
    save_peft(Adapter({"m.q_proj": pair}), tmp_path / "in", base_name="org/base")
    (line,) = export_adapter(tmp_path / "in", tmp_path / "out", tool="vllm").needs
    assert f"vllm serve org/base --enable-lora --max-lora-rank {needed} --lora-modules out=out" in line
    assert line in (tmp_path / "out/README.md").read_text()


def test_what_a_tool_does_not_take_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Pair(torch.ones(2, 513), torch.ones(513, 2))
    save_peft(Adapter({"m.q_proj": pair}), tmp_path / "wide", base_name="org/base")
    written(tmp_path / "conv", (2,), conv1d=True)
    for folder, options, said in (
        ("wide", ["--for", "vllm"], "expected a rank of at most 512"),
        ("conv", ["--for", "gguf"], "transposed weights"),
        ("wide", ["--for", "ollama"], "expected one of peft, vllm, gguf"),
        ("wide", ["--for", "vllm", "--merge"], "drop one of the two"),
    ):
        assert exit_code(["export", str(tmp_path / folder), "--to", str(tmp_path / "out"), *options]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_for_peft_a_module_that_it_does_not_load_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "in", (2,))
    unread = "stock peft does not load 1 of 12 modules; use a merged model there (export with --merge)"
    monkeypatch.setattr("fedloom.results.export.check_with_peft", lambda *_: (unread, None))
    with pytest.raises(AdapterError, match="merged model"):
        export_adapter(tmp_path / "in", tmp_path / "out", tool="peft")
    assert not (tmp_path / "out").exists()
    assert export_adapter(tmp_path / "in", tmp_path / "out").unread == unread


def test_targets_are_written_in_one_order(tmp_path: Path) -> None:
    adapter = written(tmp_path / "in", (2,))
    config = json.loads((tmp_path / "in/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(adapter)
    assert config["target_parameters"] is None
