"""A run with padded rows from settings to what is done with its result, on bases that cannot run packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from padded_families import build
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from fedloom.assembly.inputs import Workshop
from fedloom.config import Settings
from fedloom.errors import ModelError, SettingsError
from fedloom.experiment import compare, describe, run
from fedloom.models.row_attention import attention_of
from fedloom.preview.diagnosis import diagnose
from fedloom.results.held_out import evaluate
from fedloom.results.opened_result import open_result
from fedloom.sites.sheet import sheet_of

Make = Callable[..., Settings]
FEDIT = {"method__name": "fedit", "method__ranks": 2, "model__target_modules": ["query_key_value"]}
JAMBA = {"method__name": "flora", "model__target_modules": ["q_proj", "v_proj", "in_proj"]}


@pytest.fixture(scope="module", params=["bloom", "jamba"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(kind)
    build(kind).save_pretrained(path)
    return path


@pytest.fixture
def padded(kind: str, folder: Path, settings_for: Make) -> Make:
    """Return a function that makes settings with padded rows on the base."""
    of_kind = FEDIT if kind == "bloom" else JAMBA
    return lambda **others: settings_for(
        **{"model__base": str(folder), "model__attention": "padded"} | of_kind | others
    )


def test_the_adapter_in_stock_peft_gives_the_runs_own_loss(padded: Make, folder: Path, tmp_path: Path) -> None:
    settings = padded(training__dropout=0.1, training__token_budget=200)
    summary = run(settings, tmp_path / "run")
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]
    workshop = Workshop()
    held_out = workshop.inputs(settings, workshop.base(settings)[0]).held_out
    assert held_out is not None
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, nats, count = PeftModel.from_pretrained(stock, tmp_path / "run/adapter").eval(), 0.0, 0
    for index in range(len(held_out)):
        ids, supervised = (torch.from_numpy(part.copy()).long() for part in held_out.row(index))
        with torch.no_grad():
            logits_TV = model(input_ids=ids[None], use_cache=False).logits[0]
        learned = supervised[1:].bool()
        nats += float(cross_entropy(logits_TV[:-1][learned], ids[1:][learned], reduction="sum"))
        count += int(learned.sum())
    assert summary.eval["loss_nats"] == pytest.approx(nats / count, abs=1e-5)
    by_run = evaluate(open_result(tmp_path / "run")).scores["result"]
    assert by_run.nats_per_token.value == pytest.approx(summary.eval["loss_nats"], abs=1e-5)


def test_an_adapter_folder_is_opened_with_the_passes_that_its_base_can_run(padded: Make, tmp_path: Path) -> None:
    run(padded(), tmp_path / "run")
    opened = open_result(tmp_path / "run/adapter", tokenizer="bytes")
    assert attention_of(opened.base.model) == "padded"


def test_the_preview_refuses_what_a_run_refuses_and_takes_what_it_takes(padded: Make, tmp_path: Path) -> None:
    settings = padded(model__attention="packed")
    with pytest.raises(ModelError, match=r"set model\.attention = padded"):
        run(settings, tmp_path / "run")
    with pytest.raises(ModelError, match=r"set model\.attention = padded"):
        describe(settings)
    assert not diagnose("mine", settings).would_run
    assert diagnose("mine", padded()).would_run
    assert any(line.startswith("attention: padded, ") and "slower" in line for line in describe(padded()).lines())


def test_a_base_that_can_run_packed_is_opened_packed(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(), tmp_path / "run")
    opened = open_result(tmp_path / "run/adapter", tokenizer="bytes")
    assert attention_of(opened.base.model) == "packed"
    assert any(line.startswith("attention: packed, ") for line in describe(settings_for()).lines())


def test_sites_are_told_how_rows_pass(settings_for: Make) -> None:
    settings = settings_for(model__attention="padded", data__template="plain")
    sheet = sheet_of(settings, 0, "0" * 32, "0" * 64, "0" * 64, scores=False)
    assert sheet.attention == "padded"


def test_a_cut_model_takes_packed_rows_only(settings_for: Make) -> None:
    with pytest.raises(SettingsError, match=r"model\.attention only with method\.name = any but splitlora"):
        settings_for(model__attention="padded", method__name="splitlora", method__ranks=2)


def test_a_comparison_names_what_is_in_the_way_of_a_later_method_before_the_first(padded: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.attention"):
        compare(padded(), ["fedit", "splitlora"], [1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
