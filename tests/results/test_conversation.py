"""Asking a result: the prompt as in training, the answer beside the base's, greedy or drawn."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.data.records import Turn
from fedloom.errors import DataError, EvaluationError
from fedloom.evaluation.decoding import GREEDY, decode
from fedloom.experiment import run
from fedloom.results.chosen_round import RESULT
from fedloom.results.conversation import GumbelNoise, Sampling, converse, generate, wording_of
from fedloom.results.opened_result import OpenedResult, open_result
from fedloom.wording import printable

Make = Callable[..., Settings]
SHORT = Sampling(max_new_tokens=5)


@pytest.fixture
def flora(settings_for: Make, tmp_path: Path) -> Path:
    run(settings_for(), tmp_path / "flora")
    return tmp_path / "flora"


def greedy(opened: OpenedResult, name: str | None, prompt: str) -> str:
    settings = type(GREEDY)(num_beams=1, length_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=5)
    return decode(opened.use(name), opened.base.tokenizer, [prompt], settings).outputs[0]


def test_answers_are_the_greedy_ones_of_result_and_base_to_the_prompt_of_training(flora: Path) -> None:
    opened = open_result(flora)
    answered = generate(opened, "red cat", sampling=SHORT)
    assert answered.worded == "Question: red cat\nAnswer:"
    assert answered.answers == {
        RESULT: greedy(opened, RESULT, answered.worded),
        "base": greedy(opened, None, answered.worded),
    }
    assert list(generate(opened, "red cat", sampling=SHORT, beside_base=False).answers) == [RESULT]


def test_a_template_takes_the_place_of_the_runs_and_none_leaves_the_prompt(flora: Path) -> None:
    opened = open_result(flora)
    assert "### Instruction" in generate(opened, "x", template="alpaca", sampling=SHORT).worded
    assert generate(opened, "as typed", template="none", sampling=SHORT).worded == "as typed"


def test_a_pefts_wording_is_the_chat_template_else_plain(flora: Path) -> None:
    opened = open_result(flora / "adapter", tokenizer="bytes")
    assert wording_of(opened).prompt([Turn("user", "hi")], opened.base.tokenizer).text == "Question: hi\nAnswer:"
    opened.base.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "why")]
    wording = wording_of(opened)
    assert wording.is_dialogue
    assert wording.prompt(turns, opened.base.tokenizer).text == "<user>hi\n<assistant>yes\n<user>why\n<assistant>"


def test_a_dialogue_remembers_and_forgets_the_oldest_when_the_context_is_full(
    settings_for: Make, tmp_path: Path
) -> None:
    file = tmp_path / "turns.json"
    rows = [
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
            "category": str(k % 3),
        }
        for k in range(24)
    ]
    file.write_text(json.dumps(rows))
    run(settings_for(data__path=str(file), data__shape="auto"), tmp_path / "run")
    talk = converse(open_result(tmp_path / "run"), sampling=SHORT, beside_base=False)
    assert talk.wording.is_dialogue
    first, second = talk.ask("one"), talk.ask("two")
    assert first.worded == "User: one\nAssistant:"
    assert second.worded.startswith("User: one\nAssistant:")
    assert second.worded.endswith("User: two\nAssistant:")
    talk.opened.base.model.config.max_position_embeddings = 60
    third = talk.ask("three")
    assert "User: one" not in third.worded
    assert third.worded.endswith("User: three\nAssistant:")


def test_a_draw_repeats_with_its_seed_and_changes_with_it(flora: Path) -> None:
    opened = open_result(flora)
    draws = [
        generate(opened, "red", sampling=Sampling(8, temperature=2.0, seed=seed), beside_base=False).answers[RESULT]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    noise = GumbelNoise(Sampling(temperature=2.0), "prompt")
    drawn = [int(noise(torch.zeros(1, 1), logits).argmax()) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=3) / 4000
    np.testing.assert_allclose(shares, torch.softmax(logits[0] / 2.0, 0).numpy(), atol=0.03)


def test_a_prompt_without_room_and_sampling_that_makes_no_sense_are_refused(flora: Path) -> None:
    opened = open_result(flora)
    opened.base.model.config.max_position_embeddings = 30
    assert len(generate(opened, "red", sampling=Sampling(50)).answers) == 2
    opened.base.model.config.max_position_embeddings = 20
    with pytest.raises(EvaluationError, match="expected a prompt of at most 19 tokens"):
        generate(opened, "a long question", sampling=SHORT)
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}):
        with pytest.raises(EvaluationError, match="expected at least 1 new token"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_the_command_answers_once_or_line_by_line(
    flora: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", str(flora), "--max-new-tokens", "5"]
    assert exit_code([*command, "--prompt", "red cat", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["answers"]) == {"result", "base"}
    monkeypatch.setattr("sys.stdin", io.StringIO("red cat\n\nblue dog\n"))
    assert exit_code([*command, "--interactive"]) == 0
    out, err = capsys.readouterr()
    assert out.count("result: ") == out.count("base: ") == 2
    assert f"result: {printable(printed['answers']['result'].splitlines()[0])}" in out
    assert "every line is a question of its own" in err
    assert exit_code(command) == 2
    assert "expected either --prompt TEXT or --interactive, got neither" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_one_line(
    flora: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code(["generate", str(flora), "--only", "--prompt", "bad\udcff byte"]) == 2
    wanted = "error: prompt: expected UTF-8 text, got the byte 0xff after "
    assert wanted in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"bad\xff byte\n"), encoding="utf-8"))
    assert exit_code(["generate", str(flora), "--only", "--interactive"]) == 2
    assert wanted in capsys.readouterr().err
    with pytest.raises(DataError, match=r"got U\+D83D, half of a character, after"):
        generate(open_result(flora), "smile \ud83d")


@pytest.mark.data
def test_the_base_tells_its_golden_story_beside_the_result(data_dir: Path, settings_for: Make, tmp_path: Path) -> None:
    base = data_dir / "models/stories260K"
    run(settings_for(model__base=str(base), model__tokenizer=None, method__ranks=[2, 2, 2]), tmp_path / "run")
    golden = (data_dir / "models/golden_stories260K.txt").read_text(encoding="utf-8")
    answered = generate(open_result(tmp_path / "run"), "Once upon a time", template="none", sampling=Sampling(20))
    assert golden.startswith("Once upon a time")
    continued = golden.removeprefix("Once upon a time").strip()
    assert continued.startswith(answered.answers["base"])
    assert len(answered.answers["base"]) > 20
