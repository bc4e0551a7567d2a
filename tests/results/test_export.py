"""Exports: what they lose is what they say, and other tools read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from example_runs import rewrite
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedloom.assembly.inputs import Workshop
from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.data.tokenizer import load_tokenizer
from fedloom.embedded import model_path
from fedloom.errors import AdapterError, ModelError, RunError
from fedloom.experiment import run
from fedloom.lora.algebra import distance, norm
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import base_of, load_peft, save_peft
from fedloom.results.chosen_round import RESULT
from fedloom.results.export import export_adapter
from fedloom.results.merged_export import export_merged
from fedloom.results.opened_result import open_result
from fedloom.run_folder.writer import RunFolder
from fedloom.seeding import torch_stream

Make = Callable[..., Settings]
IDS = torch.tensor([[72, 101, 108, 108, 111, 33]])


@pytest.fixture
def flora(settings_for: Make, tmp_path: Path) -> Path:
    run(settings_for(), tmp_path / "flora")
    return tmp_path / "flora"


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter))(IDS).logits


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def ours(run_folder: Path) -> torch.Tensor:
    opened = open_result(run_folder)
    with torch.no_grad():
        return opened.use(RESULT).model(IDS).logits


def test_an_exported_adapter_gives_stock_peft_our_logits_and_brings_its_card(
    flora: Path, base_folder: Path, tmp_path: Path
) -> None:
    exported = export_adapter(flora, tmp_path / "out")
    assert (exported.rank_error, exported.cast_error) == (0.0, 0.0)
    torch.testing.assert_close(logits_of(base_folder, tmp_path / "out"), ours(flora), rtol=1e-5, atol=1e-6)
    card = (tmp_path / "out/README.md").read_text()
    manifest = json.loads((flora / "manifest.json").read_text())
    finished = json.loads((flora / "finished.json").read_text())
    for fact in (
        manifest["identity"]["data_sha256"],
        manifest["identity"]["base_sha256"],
        f"{finished['eval']['loss_nats']:.4f}",
        "| rounds | 2 |",
        "| ranks of the clients | 4, 2, 1 |",
        "| method | flora |",
        "PeftModel.from_pretrained",
    ):
        assert fact in card


def test_the_runs_own_adapters_carry_their_cards(flora: Path, settings_for: Make, tmp_path: Path) -> None:
    loss = json.loads((flora / "finished.json").read_text())["eval"]["loss_nats"]
    assert f"| held-out loss | {loss:.4f} nats per token |" in card_of(flora / "adapter")
    (flora / "adapter/README.md").unlink()
    run(settings_for(), flora)
    assert "| method | flora |" in card_of(flora / "adapter")
    run(settings_for(method__name="standalone"), tmp_path / "alone")
    own = json.loads((tmp_path / "alone/finished.json").read_text())["eval"]["loss_nats_of_client"]["2"]
    assert f"| held-out loss | {own:.4f} nats per token |" in card_of(tmp_path / "alone/adapter/client-2")


def test_a_card_gives_the_loss_of_the_file_or_says_that_it_is_the_runs(
    flora: Path, settings_for: Make, tmp_path: Path
) -> None:
    export_adapter(flora, tmp_path / "low", rank=1)
    assert "| held-out loss of the run's own adapter, before compression or rounding |" in card_of(tmp_path / "low")
    run(settings_for(method__name="standalone"), tmp_path / "alone")
    export_adapter(tmp_path / "alone", tmp_path / "own", client=1)
    own = json.loads((tmp_path / "alone/finished.json").read_text())["eval"]["loss_nats_of_client"]["1"]
    assert f"| held-out loss | {own:.4f} nats per token |" in card_of(tmp_path / "own")


def test_a_card_does_not_tell_where_the_base_lies_on_this_machine(
    flora: Path, base_folder: Path, tmp_path: Path
) -> None:
    export_adapter(flora, tmp_path / "out")
    assert str(base_folder) not in card_of(tmp_path / "out")
    assert f'from_pretrained("path/to/{base_folder.name}")' in card_of(tmp_path / "out")
    assert "base_model:" not in card_of(tmp_path / "out")


def test_no_exported_file_tells_where_the_base_lies_on_this_machine(
    flora: Path, base_folder: Path, tmp_path: Path
) -> None:
    export_adapter(flora, tmp_path / "out", rank=2)
    export_adapter(tmp_path / "out", tmp_path / "again")
    export_merged(flora, tmp_path / "merged")
    for name in ("out", "again", "merged"):
        for file in (tmp_path / name).iterdir():
            assert str(base_folder.parent).encode() not in file.read_bytes(), file
    first, second = (base_of(tmp_path / name) for name in ("out", "again"))
    assert first == second == base_of(flora / "adapter")
    assert first is not None
    assert (first[0], first[1].is_folder) == (base_folder.name, True)
    assert "base_model:" not in card_of(tmp_path / "again")


def test_an_export_on_the_embedded_base_names_it_and_loads_in_stock_peft(settings_for: Make, tmp_path: Path) -> None:
    embedded = {"model__base": "embedded", "model__tokenizer": None, "data__max_length": 100}
    run(settings_for(**embedded, federation__num_rounds=1), tmp_path / "run")
    export_adapter(tmp_path / "run", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(model_path())
    assert PeftModel.from_pretrained(base, tmp_path / "out").peft_config["default"].r > 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"
    assert open_result(tmp_path / "out").adapters
    assert "fedloom.embedded" in card_of(tmp_path / "out")


def test_a_lower_rank_says_exactly_what_it_leaves_out(flora: Path, tmp_path: Path) -> None:
    exported = export_adapter(flora, tmp_path / "out", rank=2)
    whole, low = load_peft(flora / "adapter"), load_peft(tmp_path / "out")
    assert set(low.ranks.values()) == {2}
    assert exported.rank_error == pytest.approx(distance(whole, low), rel=1e-4)
    assert exported.share(exported.rank_error) == pytest.approx(distance(whole, low) / norm(whole), rel=1e-4)
    assert 0.0 < exported.rank_error < exported.norm
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {}, {})


def test_the_largest_rank_is_lossless_and_one_above_it_is_refused(flora: Path, tmp_path: Path) -> None:
    largest = max(load_peft(flora / "adapter").ranks.values())
    exported = export_adapter(flora, tmp_path / "out", rank=largest)
    assert "lossless" in exported.rank_line()
    lost = distance(load_peft(flora / "adapter"), load_peft(tmp_path / "out"))
    assert exported.rank_error == pytest.approx(lost, abs=1e-8 * exported.norm)
    assert lost < 1e-7 * exported.norm
    with pytest.raises(AdapterError, match=f"expected 1 to {largest}, the largest rank of the adapter, got 60; choose"):
        export_adapter(flora, tmp_path / "more", rank=60)
    assert not (tmp_path / "more").exists()


def test_small_singular_values_of_a_wide_module_are_exported_too(tmp_path: Path) -> None:
    sigma = torch.logspace(0, -4, 16)
    wide = Pair(torch.eye(11008, 16) * sigma, torch.eye(16, 64))
    save_peft(Adapter({"layer": wide}), tmp_path / "adapter", base_name="wide")
    export_adapter(tmp_path / "adapter", tmp_path / "all", rank=16)
    assert distance(load_peft(tmp_path / "all"), Adapter({"layer": wide})) < 1e-6
    exported = export_adapter(tmp_path / "adapter", tmp_path / "most", rank=11)
    assert exported.rank_error == pytest.approx(float(sigma[11:].norm()), rel=1e-5)
    assert "the rank drops 0.116% of the update" in exported.rank_line()


@pytest.mark.parametrize("rank", [0, 2.5])
def test_a_rank_that_is_not_a_whole_number_is_refused(flora: Path, tmp_path: Path, rank: int) -> None:
    with pytest.raises(AdapterError, match=f"expected a whole number of 1 or more .*, got {rank}"):
        export_adapter(flora, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_a_narrower_adapter_says_what_rounding_loses(flora: Path, tmp_path: Path) -> None:
    exported = export_adapter(flora, tmp_path / "out", dtype="bfloat16")
    lost = distance(load_peft(flora / "adapter"), load_peft(tmp_path / "out"))
    assert exported.cast_error == pytest.approx(lost, rel=1e-4)
    assert 1e-4 < exported.share(lost) < 1e-2


def test_a_merged_model_stands_alone(flora: Path, tmp_path: Path) -> None:
    exported = export_merged(flora, tmp_path / "out")
    assert (exported.dtype, exported.form) == ("float32", "merged model")
    assert exported.share(exported.cast_error) < 1e-3
    torch.testing.assert_close(logits_of(tmp_path / "out"), ours(flora), rtol=1e-4, atol=1e-5)
    assert load_tokenizer(tmp_path / "out")("Hi").input_ids == [72, 105]


def test_weights_beyond_the_range_of_the_type_are_not_written(flora: Path, tmp_path: Path) -> None:
    large = load_peft(flora / "adapter").scaled(1e9)
    with RunFolder.open(flora, json.loads((flora / "config.json").read_text()), {}) as folder:
        folder.write_folder("adapter", lambda path: save_peft(large, path, base_name=""))
    for export in (export_adapter, export_merged):
        with pytest.raises(AdapterError, match=r"expected finite .*(wider dtype|--dtype)"):
            export(flora, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_merging_says_what_the_cast_loses(flora: Path, base_folder: Path, tmp_path: Path) -> None:
    exported = export_merged(flora, tmp_path / "out", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    lost = 0.0
    for name, pair in load_peft(flora / "adapter").items():
        after, before = (model.get_submodule(name).weight.bfloat16().double() for model in (merged, base))
        lost += float((after - before - pair.delta().double()).detach().square().sum())
    assert merged.dtype == torch.bfloat16
    assert exported.cast_error == pytest.approx(lost**0.5, rel=1e-5)
    assert exported.share(exported.cast_error) > 1e-3


def test_gpt2s_transposed_weights_are_merged_the_right_way_round(tmp_path: Path) -> None:
    from tiny_models import seeded_model

    base = tmp_path / "gpt2"
    seeded_model("gpt2", vocab_size=256).float().save_pretrained(base)
    load_tokenizer("bytes").save_pretrained(base)
    draw = torch_stream(1, "pair")
    pairs = {
        f"transformer.h.{i}.attn.c_attn": Pair(torch.randn(48, 2, generator=draw), torch.randn(2, 16, generator=draw))
        for i in range(2)
    }
    save_peft(Adapter(pairs), tmp_path / "adapter", base_name=str(base), conv1d=True)
    export_merged(tmp_path / "adapter", tmp_path / "merged", base=base)
    export_adapter(tmp_path / "adapter", tmp_path / "copy", rank=1)
    theirs = logits_of(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(tmp_path / "merged"), theirs, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "copy/adapter_config.json").read_text())["fan_in_fan_out"]


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    flora: Path, settings_for: Make, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="expected a new or an empty folder"):
        export_adapter(flora, full)
    (flora / "finished.json").unlink()
    with pytest.raises(RunError, match=r"has not finished .*; then export it"):
        export_adapter(flora, tmp_path / "out")
    run(settings_for(method__name="base", method__ranks=1), tmp_path / "base")
    with pytest.raises(AdapterError, match="adds nothing"):
        export_adapter(tmp_path / "base", tmp_path / "out")
    assert [entry.name for entry in full.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_one_client_of_a_standalone_run_is_exported(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(method__name="standalone"), tmp_path / "alone")
    with pytest.raises(RunError, match="choose one with --client K"):
        export_adapter(tmp_path / "alone", tmp_path / "out")
    export_adapter(tmp_path / "alone", tmp_path / "out", client=1)
    own = load_peft(tmp_path / "alone/adapter/client-1")
    assert distance(own, load_peft(tmp_path / "out")) < 1e-6


def test_a_quantized_base_is_not_merged_into(flora: Path, tmp_path: Path) -> None:
    settings = json.loads((flora / "config.json").read_text())
    settings["model"]["quantization"] = "4bit"
    rewrite(flora, "config.json", settings)
    with pytest.raises(ModelError, match=r"quantized to 4bit, .*without --merge"):
        export_merged(flora, tmp_path / "out")


def test_a_target_that_shares_its_weights_is_not_merged_into(tmp_path: Path) -> None:
    from tiny_models import seeded_model

    base = tmp_path / "gpt2"
    seeded_model("gpt2", vocab_size=256).float().save_pretrained(base)
    load_tokenizer("bytes").save_pretrained(base)
    save_peft(
        Adapter({"lm_head": Pair(torch.ones(256, 1), torch.ones(1, 16))}), tmp_path / "adapter", base_name=str(base)
    )
    with pytest.raises(ModelError, match=r"lm_head shares its weights with transformer\.wte"):
        export_merged(tmp_path / "adapter", tmp_path / "out", base=base)


@pytest.mark.slow
@pytest.mark.data
def test_an_exported_flora_run_on_dolly_gives_stock_peft_the_runs_own_loss(
    data_dir: Path, settings_for: Make, tmp_path: Path
) -> None:
    base = data_dir / "models/stories3M"
    settings = settings_for(
        model__base=str(base),
        model__tokenizer=None,
        data__path=str(data_dir / "instruct/dolly15k_10clients"),
        data__max_rows=90,
        data__overlong="drop",
        partition__categories_per_client=4,
    )
    summary = run(settings, tmp_path / "run")
    export_adapter(tmp_path / "run", tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    held_out = Workshop().inputs(settings, open_result(tmp_path / "run").base).held_out
    assert held_out is not None
    nats, count = 0.0, 0
    for index in range(len(held_out)):
        ids, supervised = held_out.row(index)
        with torch.no_grad():
            logits = model(torch.tensor(ids[None].astype("int64"))).logits[0, :-1]
        chosen = torch.tensor(supervised[1:])
        targets = torch.tensor(ids[1:].astype("int64"))[chosen]
        nats += float(torch.nn.functional.cross_entropy(logits[chosen].double(), targets, reduction="sum"))
        count += len(targets)
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]
    assert nats / count == pytest.approx(summary.eval["loss_nats"], rel=1e-5)


def test_the_command_exports_and_refuses_in_one_line(
    flora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["export", str(flora), "--to", str(tmp_path / "out"), "--rank", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["relative_rank_error"] == pytest.approx(printed["rank_error"] / printed["norm"])
    assert exit_code(["export", str(flora), "--to", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: --to {tmp_path / 'out'}: expected")


def test_an_export_whose_base_is_elsewhere_says_that_it_was_not_checked_and_how_to(
    flora: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    export_adapter(flora, alone)
    told = export_adapter(alone, tmp_path / "copy")
    assert (told.unread, len(told.lines())) == (None, 3)
    assert re.match(
        r"not checked with stock peft: its base '.*' is not on this machine; .*--base FOLDER", told.lines()[-1]
    )
    assert "not checked" not in card_of(tmp_path / "copy")
    command = ["export", str(alone), "--to", str(tmp_path / "checked"), "--base"]
    assert exit_code([*command, str(tmp_path / "nowhere")]) == 2
    assert "error: --base: expected a folder with config.json" in capsys.readouterr().err
    assert exit_code([*command, str(base_folder)]) == 0
    assert "stock peft" not in capsys.readouterr().out


def test_the_base_that_is_given_is_the_one_that_is_checked(flora: Path, tmp_path: Path) -> None:
    from tiny_models import seeded_model

    seeded_model("gpt2", vocab_size=256).save_pretrained(tmp_path / "other")
    told = export_adapter(flora, tmp_path / "out", base=tmp_path / "other")
    assert "stock peft" in str(told.unread)
    assert told.unchecked is None


def test_a_base_whose_configuration_cannot_be_read_is_named_as_the_reason(
    flora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_adapter(flora, tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    own = tmp_path / str(json.loads((tmp_path / "alone/adapter_config.json").read_text())["base_model_name_or_path"])
    own.mkdir()
    (own / "config.json").write_text('{"model_type": "of-its-own", "auto_map": {"AutoConfig": "code.Config"}}')
    told = export_adapter(tmp_path / "alone", tmp_path / "copy")
    assert str(told.unchecked).startswith("not checked with stock peft: ")
    with pytest.raises(ModelError, match="needs Python code"):
        export_adapter(flora, tmp_path / "out", base=own)


def test_a_text_part_that_does_not_load_alone_is_not_merged_into(flora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_result(flora)
    opened.base.model.config.model_type = "emu3_text_model"
    monkeypatch.setattr("fedloom.results.merged_export.load_base_of", lambda *_, **__: opened.base)
    with pytest.raises(ModelError, match=r"text part of another kind \('emu3_text_model'\).*export the adapter"):
        export_merged(flora, flora.parent / "merged")
    assert not (flora.parent / "merged").exists()
