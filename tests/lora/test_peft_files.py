"""Our files are PEFT's: stock peft gives the same logits from what we write, and we read what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_models import TARGETS, tiny_model

from fedloom.errors import AdapterError
from fedloom.lora import algebra
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import CONFIG_NAME, WEIGHTS_NAME, load_peft, save_peft
from fedloom.seeding import torch_stream

TOKENS = torch.arange(24).view(1, 24) % 50


def side_logits(family: str, adapter: Adapter) -> torch.Tensor:
    lora = LoRAModel(tiny_model(family), TARGETS[family])
    lora.set_side(adapter)
    return lora.model(TOKENS).logits


def mixed_rank_adapter(family: str) -> Adapter:
    shapes, generator = LoRAModel(tiny_model(family), TARGETS[family]).shapes, torch_stream(1, "b")
    pairs = {}
    for rank, (name, shape) in enumerate(shapes.items(), start=2):
        pair = fresh_adapter({name: shape}, rank, 1)[name]
        pairs[name] = Pair(torch.randn(pair.b_OR.shape, generator=generator), pair.a_RI)
    return Adapter(pairs)


def test_stock_peft_loads_what_we_write_and_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    adapter = mixed_rank_adapter(family)
    save_peft(adapter, tmp_path, base_name="tiny", scale=2.0, conv1d=family == "gpt2")
    model = PeftModel.from_pretrained(tiny_model(family), tmp_path).double()
    assert torch.allclose(model(TOKENS).logits, side_logits(family, adapter.to(torch.float64)), atol=1e-6)
    assert algebra.distance(load_peft(tmp_path), adapter) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_stock_peft_writes_with_patterns(family: str, rslora: bool, tmp_path: Path) -> None:
    first = TARGETS[family][0]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS[family],
        rank_pattern={first: 2},
        alpha_pattern={first: 5},
        use_rslora=rslora,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_model(family), config)
    model.save_pretrained(tmp_path)
    assert torch.allclose(model(TOKENS).logits, side_logits(family, load_peft(tmp_path).to(torch.float64)), atol=1e-5)


def test_the_file_states_alpha_as_scale_times_rank(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny", scale=2.0)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, "tiny")


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    weights = tmp_path / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        load_peft(tmp_path)


def test_what_a_pair_cannot_express_is_refused(tmp_path: Path) -> None:
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora"):
        load_peft(tmp_path)


def test_numbers_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    diverged = Pair(torch.full((4, 3), math.nan), torch.ones(3, 4))
    with pytest.raises(AdapterError, match="expected finite numbers, got NaN or infinity at q"):
        save_peft(Adapter({"q": diverged}), tmp_path / "new", base_name="tiny")
    assert not (tmp_path / "new").exists()
    save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny")
    names = {f"base_model.model.q.lora_{f}.weight": t for f, t in (("B", diverged.b_OR), ("A", diverged.a_RI))}
    save_file(names, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match=f"{WEIGHTS_NAME}: expected finite numbers, got NaN or infinity at q"):
        load_peft(tmp_path)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_no_file_can_hold_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"scale: expected a finite number above 0 .*, got {scale}"):
        save_peft(Adapter({"q": Pair(torch.ones(4, 3), torch.ones(3, 4))}), tmp_path, base_name="tiny", scale=scale)
    assert not any(tmp_path.iterdir())


def test_an_adapter_that_adds_nothing_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="adds nothing"):
        save_peft(Adapter(), tmp_path / "nothing", base_name="tiny")
    assert not (tmp_path / "nothing").exists()
