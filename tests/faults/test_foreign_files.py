"""Strangers' code and files: nothing of theirs runs, is followed, or reaches the terminal as a command."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom import embedded
from fedloom.cli.app import exit_code
from fedloom.cli.output import print_json, print_line, say
from fedloom.data.tokenizer import load_tokenizer
from fedloom.errors import DataError, ModelError, RunError
from fedloom.models.load import load_base
from fedloom.models.partial_load import load_bottom, load_middle, load_top
from fedloom.reporting.progress import PlainProgress
from fedloom.run_folder import claim
from fedloom.wording import printable

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\ud800\x00"
CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran.txt").touch()
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


class NobodyReads(io.StringIO):
    """A standard input that would say yes, and counts who asks."""

    def __init__(self) -> None:
        super().__init__("y\n" * 10)
        self.num_reads = 0

    def readline(self, *_: Any) -> str:
        self.num_reads += 1
        return "y\n"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> NobodyReads:
    stdin = NobodyReads()
    monkeypatch.setattr(sys, "stdin", stdin)
    return stdin


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | entries), encoding="utf-8")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def copied(folder: Path, mark: Path) -> Path:
    shutil.copytree(embedded.model_path(), folder)
    (folder / "mine.py").write_text(CODE.format(mark=str(mark)))
    return folder


@pytest.fixture
def own_config(tmp_path: Path, mark: Path) -> Path:
    base = copied(tmp_path / "own_config", mark)
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    change(base / "config.json", model_type="mine", auto_map=auto_map)
    return base


@pytest.fixture
def own_tokenizer(tmp_path: Path, mark: Path) -> Path:
    base = copied(tmp_path / "own_tokenizer", mark)
    change(base / "config.json", model_type="llama")
    auto_map = {"AutoTokenizer": ["mine.Words", None]}
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Words", "auto_map": auto_map}))
    return base


def refused(load: Callable[[], object], answers: NobodyReads, mark: Path) -> None:
    with pytest.raises(
        ModelError, match=r"Python code of its own .* was not run; .* model.trust_remote_code = true"
    ) as e:
        load()
    assert "\n" not in str(e.value)
    assert answers.num_reads == 0
    assert not mark.exists()


@pytest.mark.parametrize(
    "load",
    [
        lambda base: load_base(base, device="cpu"),
        lambda base: load_bottom(base, 1),
        lambda base: load_middle(base, 1, 2),
        lambda base: load_top(base, 1),
    ],
    ids=["base", "bottom", "middle", "top"],
)
def test_a_base_with_code_of_its_own_is_refused_unasked(
    own_config: Path, answers: NobodyReads, mark: Path, load: Callable[[Path], object]
) -> None:
    refused(lambda: load(own_config), answers, mark)


def test_a_tokenizer_with_code_of_its_own_is_refused_unasked(
    own_tokenizer: Path, answers: NobodyReads, mark: Path
) -> None:
    refused(lambda: load_tokenizer(own_tokenizer), answers, mark)
    refused(lambda: load_base("embedded", tokenizer=own_tokenizer, device="cpu"), answers, mark)


@pytest.mark.parametrize("command", ["run", "describe", "doctor", "validate"])
@pytest.mark.parametrize("base", ["own_config", "own_tokenizer"])
def test_no_command_runs_a_strangers_code_or_asks(
    command: str,
    base: str,
    request: pytest.FixtureRequest,
    answers: NobodyReads,
    mark: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path / "run")] if command == "run" else []
    code = exit_code([command, "demo", "--set", f"model.base={request.getfixturevalue(base)}", *out])
    printed = capsys.readouterr()
    assert answers.num_reads == 0
    assert not mark.exists()
    assert "y/N" not in printed.out + printed.err
    if command == "run":
        assert code == 2
        assert [line[:6] for line in printed.err.splitlines() if "code of its own" in line] == ["error:"]


def test_code_that_is_trusted_is_run(
    own_config: Path, answers: NobodyReads, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = load_base(own_config, tokenizer="bytes", device="cpu", trust_remote_code=True)
    assert type(base.model).__name__ == "Model"
    assert mark.exists()
    assert answers.num_reads == 0


def test_code_beside_a_family_that_transformers_knows_is_left_alone(tmp_path: Path, mark: Path) -> None:
    base = copied(tmp_path / "known", mark)
    change(base / "config.json", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    load_base(base, device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("name", [claim.LOCK, *claim.ENTRIES])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_link_in_a_run_folder_is_not_followed(tmp_path: Path, name: str, kind: str) -> None:
    theirs, mine = tmp_path / "run", tmp_path / "thesis"
    theirs.mkdir()
    if kind == "file":
        mine.write_text("my thesis")
    elif kind == "folder":
        mine.mkdir()
    (theirs / name).symlink_to(mine)
    with pytest.raises(RunError, match=f"{name} is a link: expected a run's own file or folder"):
        claim.lock(theirs)
    assert not mine.is_file() or mine.read_text() == "my thesis"
    assert mine.exists() == (kind != "nothing")


@pytest.mark.parametrize(
    "make", [lambda lock, mine: lock.hardlink_to(mine), lambda lock, _: lock.mkdir(), lambda lock, _: os.mkfifo(lock)]
)
def test_a_lock_that_is_no_file_of_its_own_is_refused(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    mine = tmp_path / "thesis"
    mine.write_text("my thesis")
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / claim.LOCK, mine)
    with pytest.raises(RunError, match="is no file of its own"):
        claim.lock(tmp_path / "run")
    assert mine.read_text() == "my thesis"


def test_whatever_is_printed_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(HOSTILE)
    print_json({HOSTILE: [HOSTILE]})
    say(HOSTILE)
    PlainProgress(sys.stderr).note(HOSTILE)
    exit_code(["validate", HOSTILE.replace("\x00", "")])
    exit_code([HOSTILE])
    printed = "".join(capsys.readouterr())
    assert "\\u001b]0;owned\\u0007" in printed
    assert [c for c in printed if c != "\n" and not c.isprintable()] == []


def test_printing_changes_no_json_and_no_writing_system(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"a\tb\n{HOSTILE} 日本語 नमस्ते‍ می‌خواهم 👩‍🔬"
    print_json([text])
    assert json.loads(capsys.readouterr().out) == [text]
    plain = "tab\tline\nنص नमस्ते‍ می‌خواهم 👩‍🔬 é"
    assert printable(plain) == plain


def test_an_error_spells_out_the_control_characters_of_what_it_names() -> None:
    assert str(DataError("rows in \x1b[2J.json")) == "rows in \\u001b[2J.json"
