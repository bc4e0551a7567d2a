"""Quantised bases train as their dequantised twin does, in every type, whichever layers are adapted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedloom.data.tokenizer import byte_tokenizer
from fedloom.data.tokens import TokenSet
from fedloom.errors import ModelError
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.lora.linear import _dense_weight
from fedloom.lora.pair import Adapter, Pair
from fedloom.models.load import load_base
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort

pytestmark = [pytest.mark.extra("quantized"), pytest.mark.filterwarnings("ignore")]
PARTIAL = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small Llama of bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2
    )
    path = tmp_path_factory.mktemp("quantized")
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def rows() -> TokenSet:
    rng = np.random.default_rng(0)
    lengths = (6, 11, 9, 17)
    return TokenSet.from_rows((rng.integers(1, 256, n).tolist(), [False] * 3 + [True] * (n - 3)) for n in lengths)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_says_it_is_quantised_and_is_not_is_refused(folder: Path, tmp_path: Path, bits: int) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="choose the unquantised base"):
        load_base(base)


def moved(adapter: Adapter) -> float:
    """Return the norm of the change of the factors since the start, which the base's shapes give."""
    before = fresh_adapter(adapter.shapes, 2, 0).as_tensors()
    return float(torch.stack([(after - before[key]).norm() for key, after in adapter.as_tensors().items()]).norm())


def trained(model: Any) -> Any:
    """Train an adapter on two layers below all others, beside a side on the same ones."""
    lora = LoRAModel(model, PARTIAL)
    start = fresh_adapter(lora.shapes, 2, 0)
    side = Adapter({n: Pair(torch.full((o, 1), 0.05), torch.full((1, i), 0.05)) for n, (o, i) in lora.shapes.items()})
    lora.set_side(side)
    settings = LocalTraining(learning_rate=1e-2, batch_size=4, steps=3)
    return train_cohort(lora, [ClientTask(0, rows(), 2, 1.0, start)], settings, seed=0, round=1)[0]


def twin(folder: Path, quantized: Any, device: str) -> Any:
    """Return the unquantised model with the numbers that the quantised one holds."""
    plain = load_base(folder, device=device).model
    for name, module in quantized.named_modules():
        if type(module).__module__.startswith("bitsandbytes"):
            plain.get_submodule(name).weight.data.copy_(_dense_weight(module).float())
    return plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_partial_targets_train_as_on_the_dequantised_base(
    folder: Path, quantization: Any, dtype: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a CPU on which bitsandbytes would pack weights for inference and lose their gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = load_base(folder, device=device, dtype=dtype, quantization=quantization)
    with torch.no_grad():
        base.model(input_ids=torch.arange(5, device=device)[None])
    plain = twin(folder, base.model, device)
    found, expected = trained(base.model), trained(plain)
    close = 0.01 if dtype == "float32" and quantization == "4bit" else 0.05
    assert found.stats.loss_last_nats == pytest.approx(expected.stats.loss_last_nats, abs=close)
    assert moved(found.adapter) == pytest.approx(moved(expected.adapter), rel=0.1)
