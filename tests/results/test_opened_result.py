"""Opening runs and PEFT folders, and measuring them on held-out rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_models import seeded_model
from transformers import AutoModelForCausalLM

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.data.tokenizer import byte_tokenizer
from fedloom.data.tokens import TokenSet
from fedloom.errors import AdapterError, DataError, ModelError, RunError
from fedloom.experiment import run
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import save_peft
from fedloom.results.chosen_round import RESULT
from fedloom.results.held_out import RowChoice, evaluate, spelled_texts
from fedloom.results.opened_result import OpenedResult, find_result, open_result

Make = Callable[..., Settings]
IDS = torch.tensor([[72, 101, 108, 108, 111, 33]])


@pytest.fixture
def flora(settings_for: Make, tmp_path: Path) -> Path:
    run(settings_for(), tmp_path / "flora")
    return tmp_path / "flora"


@pytest.fixture
def standalone(settings_for: Make, tmp_path: Path) -> Path:
    run(settings_for(method__name="standalone"), tmp_path / "standalone")
    return tmp_path / "standalone"


def stopped(folder: Path, num_rounds: int) -> Path:
    """Make a finished run look as if it had stopped after some rounds."""
    for name in ("finished.json", "adapter"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for n in range(num_rounds + 1, 1 + len(list((folder / "rounds").iterdir()))):
        shutil.rmtree(folder / "rounds" / str(n))
    return folder


def logits(opened: OpenedResult, name: str | None) -> torch.Tensor:
    with torch.no_grad():
        return opened.use(name).model(IDS).logits


def test_a_run_and_its_adapter_folder_open_as_the_same_model_which_is_pefts(flora: Path, base_folder: Path) -> None:
    opened, folder = open_result(flora), open_result(flora / "adapter", tokenizer="bytes")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        untouched = base(IDS).logits
        theirs = PeftModel.from_pretrained(base, flora / "adapter")(IDS).logits
    torch.testing.assert_close(logits(opened, None), untouched)
    torch.testing.assert_close(logits(opened, RESULT), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(folder, RESULT), logits(opened, RESULT))
    assert not torch.allclose(theirs, untouched, rtol=1e-3)


def test_a_runs_own_held_out_rows_give_the_runs_own_figures(flora: Path) -> None:
    finished = json.loads((flora / "finished.json").read_text())
    measured = evaluate(open_result(flora))
    assert measured.scores["base"].nats_per_token.value == pytest.approx(finished["base_eval"]["loss_nats"], rel=1e-6)
    assert measured.scores[RESULT].nats_per_token.value == pytest.approx(finished["eval"]["loss_nats"], rel=1e-6)
    assert measured.scores[RESULT].num_loss_tokens == finished["eval"]["num_loss_tokens"]
    assert measured.differences[RESULT].value < 0


def test_the_loss_is_told_by_category_and_is_the_runs_own(flora: Path) -> None:
    measured = evaluate(open_result(flora))
    recorded = json.loads((flora / "finished.json").read_text())["eval"]["loss_nats_of_group"]
    assert {group: values[RESULT] for group, values in measured.of_group().items()} == pytest.approx(recorded)
    assert measured.lines()[-len(recorded) - 1].split()[:3] == ["category", "base", "result"]


def test_how_rows_are_read_needs_rows_to_read() -> None:
    with pytest.raises(DataError, match="expected a path with max_length, got none"):
        RowChoice(max_length=5)


def test_bytes_and_words_are_those_of_the_answers(flora: Path, rows_file: Path) -> None:
    answers = [f" {row['response']}" for row in json.loads(rows_file.read_text())]
    measured = evaluate(open_result(flora), RowChoice(str(rows_file)))
    score = measured.scores[RESULT]
    assert (score.num_rows, score.num_words) == (48, 48)
    assert score.num_bytes == sum(map(len, answers))
    assert score.num_loss_tokens == score.num_bytes + 48  # bytes are tokens here, and each answer has an end of text


def test_rows_without_an_answer_are_left_out_and_counted(flora: Path, rows_file: Path, tmp_path: Path) -> None:
    rows = json.loads(rows_file.read_text())
    rows[1]["response"] = None
    (tmp_path / "some.json").write_text(json.dumps(rows))
    measured = evaluate(open_result(flora), RowChoice(str(tmp_path / "some.json")))
    assert measured.lines()[1] == "47 of 48 rows kept; dropped: 1 without an answer"
    assert (measured.as_dict()["num_rows"], measured.as_dict()["row_counts"]["num_unanswered"]) == (47, 1)
    (tmp_path / "none.json").write_text(json.dumps([{**row, "response": ""} for row in rows]))
    with pytest.raises(DataError, match=r"dropped: 48 without an answer\); check the rows and their shape"):
        evaluate(open_result(flora), RowChoice(str(tmp_path / "none.json")))


def test_a_row_that_is_too_long_names_the_options_of_the_command(flora: Path, rows_file: Path) -> None:
    with pytest.raises(DataError, match=r"--max-length is 5 .*raise --max-length, or set --overlong to 'drop'"):
        evaluate(open_result(flora), RowChoice(str(rows_file), max_length=5))


def test_a_text_file_is_predicted_whole(flora: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time\nthere was a cat.\n", encoding="utf-8")
    score = evaluate(open_result(flora), RowChoice(str(tmp_path / "story.txt"), shape="text")).scores[RESULT]
    assert (score.num_bytes, score.num_words) == (34, 8)


def test_texts_keep_the_space_before_an_answer_and_drop_special_tokens() -> None:
    ids = np.frombuffer("Q: é? A: oui".encode() + b"\x00", np.uint8)
    supervised = np.arange(len(ids)) >= len("Q: é? A:".encode())
    assert spelled_texts(TokenSet.from_rows([(ids, supervised)]), byte_tokenizer()) == [" oui"]


def test_an_unfinished_run_opens_at_its_last_round_and_says_how_to_finish(flora: Path) -> None:
    last = json.loads((flora / "metrics.jsonl").read_text().splitlines()[-1])
    opened = open_result(stopped(flora, num_rounds=2))
    assert evaluate(opened).scores[RESULT].nats_per_token.value == pytest.approx(last["eval"]["loss_nats"], rel=1e-6)
    (note,) = opened.found.notes
    assert "round 2 of 2" in note
    assert f"fedloom run {flora / 'config.json'} --out {flora}" in note
    with pytest.raises(RunError, match="there is no round to use yet"):
        open_result(stopped_without_rounds(flora))


def stopped_without_rounds(folder: Path) -> Path:
    shutil.rmtree(folder / "rounds")
    return folder


def test_a_finished_run_without_its_adapter_is_not_taken_for_its_base(standalone: Path, settings_for: Make) -> None:
    gone = standalone / "adapter/client-1"
    weights = (gone / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(gone)
    with pytest.raises(RunError, match=r"client-1: expected the adapter that this run wrote, found none; write it"):
        open_result(standalone)
    run(settings_for(method__name="standalone"), standalone)
    assert (gone / "adapter_model.safetensors").read_bytes() == weights


def test_a_standalone_run_has_an_adapter_per_client(standalone: Path) -> None:
    finished = json.loads((standalone / "finished.json").read_text())
    measured = evaluate(open_result(standalone))
    assert list(measured.scores) == ["base", "client-0", "client-1", "client-2"]
    assert measured.mean_nats == pytest.approx(finished["eval"]["loss_nats"], rel=1e-6)
    assert list(open_result(standalone, client=1).adapters) == ["client-1"]
    with pytest.raises(RunError, match="expected one of 0, 1, 2"):
        open_result(standalone, client=7)


def test_the_base_method_opens_as_the_base_alone(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(method__name="base", method__ranks=1), tmp_path / "base")
    measured = evaluate(open_result(tmp_path / "base"))
    assert list(measured.scores) == ["base"]
    assert math.isfinite(measured.mean_nats)


def test_another_base_is_refused_by_hash_for_a_run_and_by_shape_for_an_adapter(flora: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    seeded_model("llama", vocab_size=257).float().save_pretrained(other)
    with pytest.raises(ModelError, match="expected the base it was trained on"):
        open_result(flora, base=other)
    gpt2 = tmp_path / "gpt2"
    seeded_model("gpt2", vocab_size=256).float().save_pretrained(gpt2)
    with pytest.raises(ModelError, match=r"expected the base it was trained on \(sha256 \w{12}\), got .*sha256 \w{12}"):
        open_result(flora / "adapter", base=gpt2, tokenizer="bytes")
    save_peft(next(iter(find_result(flora).adapters.values())), tmp_path / "unhashed", base_name="elsewhere/llama")
    with pytest.raises(AdapterError, match="is for another base"):
        open_result(tmp_path / "unhashed", base=gpt2, tokenizer="bytes")


def test_a_base_that_moved_is_named_with_the_option_that_finds_it(flora: Path, base_folder: Path) -> None:
    moved = Path(shutil.copytree(flora / "adapter", flora.parent / "moved"))
    asked = rf"moved: expected its base, a folder called '{base_folder.name}', found none here; give it with --base"
    with pytest.raises(ModelError, match=asked):
        open_result(moved, tokenizer="bytes")
    config = moved / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{base_folder.name}"', '"/nowhere/base"'))
    with pytest.raises(ModelError, match=r"'/nowhere/base' cannot be loaded from here.*--base FOLDER"):
        open_result(moved, tokenizer="bytes")
    assert open_result(moved, base=base_folder, tokenizer="bytes").adapters


def test_an_adapter_of_a_run_is_opened_over_the_base_that_the_run_names(flora: Path) -> None:
    assert open_result(flora / "adapter", tokenizer="bytes").adapters


def test_a_base_folder_of_the_right_name_is_found_where_the_command_runs(
    flora: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Path(shutil.copytree(flora / "adapter", flora.parent / "moved"))
    monkeypatch.chdir(base_folder.parent)
    assert open_result(moved, tokenizer="bytes").adapters


def test_an_adapter_that_touches_a_part_of_the_modules_opens(base_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    pair = Pair(torch.ones(16, 1), torch.ones(1, 16))
    save_peft(Adapter({name: pair}), tmp_path / "part", base_name=str(base_folder))
    opened = open_result(tmp_path / "part", base=base_folder, tokenizer="bytes")
    assert list(opened.lora.shapes) == [name]
    assert fresh_adapter(opened.lora.shapes, 1, 0).keys() == {name}


def test_what_is_neither_run_nor_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a run or of a PEFT adapter"):
        find_result(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RunError, match=r"found notes\.txt"):
        find_result(tmp_path)


def test_an_adapter_has_no_rows_of_its_own(flora: Path) -> None:
    with pytest.raises(DataError, match="--data FILE"):
        evaluate(open_result(flora / "adapter", tokenizer="bytes"))


def test_the_command_prints_figures_to_stdout_and_notes_to_stderr(
    flora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["evaluate", str(flora), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["scores"]["result"]["nats_per_token"]["value"] < printed["scores"]["base"]["nats_per_token"]["value"]
    assert exit_code(["evaluate", str(stopped(flora, num_rounds=2))]) == 0
    out, err = capsys.readouterr()
    assert "result − base, nats per byte:" in out
    assert "note: " in err
    assert exit_code(["evaluate", str(flora), "--data", "absent.json"]) == 2


def test_rows_beyond_the_bases_positions_are_refused_by_the_options_name(flora: Path, rows_file: Path) -> None:
    with pytest.raises(DataError, match=r"^--max-length: expected at most the base's context of 256 tokens, got 600"):
        evaluate(open_result(flora), RowChoice(str(rows_file), max_length=600))
