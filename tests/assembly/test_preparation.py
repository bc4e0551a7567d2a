"""What a run looks at before its folder is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fedloom.assembly.inputs import Workshop
from fedloom.config import Settings
from fedloom.errors import EvaluationError, ModelError
from fedloom.experiment import run

Make = Callable[..., Settings]


def loud_base(base: Path, out: Path) -> Path:
    """Save the base with one letter whose activations pass 65504: no row lacks it, the short samples do not hold it."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    words, block = model.get_input_embeddings().weight.data, model.model.layers[0]
    words[:, 0], block.self_attn.o_proj.weight.data[0] = 0, 0
    words[ord(":")], words[ord(":"), 0] = 0, 1
    block.mlp.gate_proj.weight.data[:, 0] = block.mlp.up_proj.weight.data[:, 0] = 60
    block.mlp.down_proj.weight.data[0] = 10
    model.save_pretrained(out)
    return out


def test_a_float16_base_that_overflows_on_the_rows_makes_no_folder(
    settings_for: Make, base_folder: Path, tmp_path: Path
) -> None:
    base = loud_base(base_folder, tmp_path / "loud")
    with pytest.raises(ModelError, match=r"finite logits .* in float16, .*; set model\.dtype = float32 or bfloat16"):
        run(settings_for(model__base=str(base), model__dtype="float16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(settings_for(model__base=str(base), federation__num_rounds=1), tmp_path / "run")


def test_what_suites_ask_is_read_before_the_base_is_loaded(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workshop, "base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(EvaluationError, match="e2e: expected the references"):
        run(settings_for(evaluation__suites=["e2e"]), tmp_path / "run")


def test_rows_of_a_comparison_are_read_once(settings_for: Make, tmp_path: Path, rows_file: Path) -> None:
    workshop, settings = Workshop(), settings_for(federation__num_rounds=1)
    run(settings, tmp_path / "one", workshop=workshop)
    first = workshop.read(settings, str(rows_file), "train", None)
    run(settings_for(federation__num_rounds=1, training__batch_size=2), tmp_path / "two", workshop=workshop)
    assert workshop.read(settings, str(rows_file), "train", None) is first
    assert len(workshop._read) == len(workshop._rows) == 1
    assert not workshop._records
