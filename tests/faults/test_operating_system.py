"""What the operating system refuses is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom import embedded, load_settings
from fedloom.cli.app import exit_code
from fedloom.cli.output import say
from fedloom.data.partition import Partition
from fedloom.data.templates import load_template
from fedloom.errors import DataError, ModelError, PartitionError, RunError, SettingsError
from fedloom.models.load import load_base
from fedloom.reporting.progress import PlainProgress
from fedloom.run_folder import durable
from fedloom.run_folder.manifest import new_manifest, write_manifest


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end in one line; return it."""
    assert exit_code([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


SMALL = [
    option
    for setting in (
        "federation.num_rounds=1",
        "federation.num_clients=4",
        "partition.categories_per_client=3",
        "method.name=flora",
        "method.ranks=4",
        "training.local_steps=1",
        "training.batch_size=1",
        "training.schedule=constant",
        "data.max_rows=80",
        "evaluation.suites=[]",
        "run.keep_updates=true",
    )
    for option in ("--set", setting)
]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("partition.json", number) for number in (errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EMFILE)),
        *((name, errno.ENOSPC) for name in ("partition.json", "manifest.json", "metrics.jsonl", "adapter_model")),
    ],
)
def test_a_disk_that_refuses_any_file_of_a_run_is_one_line(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file name at a time; the run may have begun, and nothing half-written stays."""
    refusing_name = f".tmp-{name}" if name.endswith(".json") else name
    real_open = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if refusing_name in str(file) and set("wax+") & set(mode) and not str(file).endswith(".lock"):
            raise OSError(number, os.strerror(number), str(file))
        return real_open(file, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr(Path, "open", lambda self, mode="r", *a, **k: opened(self, mode, *a, **k))
        run = tmp_path / "run"
        line = refused(capsys, "run", "demo", *SMALL, "--out", run)
    assert os.strerror(number).lower() in line or "the disk is full" in line
    left = [entry.name for entry in run.rglob("*") if entry.name.startswith(".tmp-")]
    assert left == []


def test_names_that_no_file_can_have_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = tmp_path / ("a" * 300)
    for arguments in (
        ("run", "demo", "--out", long),
        ("report", long),
        ("validate", f"{long}.toml"),
        ("evaluate", long),
        ("validate", "demo", "--set", f"model.base={long}"),
        ("validate", "demo", "--set", 'model.base="a\\u0000b"'),
        ("validate", "demo", "--set", "model.base=~nosuchuser/x"),
        ("validate", "demo", "--set", "data.path=~nosuchuser/x"),
    ):
        refused(capsys, *arguments)
    with pytest.raises(SettingsError, match="NUL character"):
        load_settings("a\0b.toml")


@pytest.mark.parametrize("command", ["report", "evaluate", "generate"])
@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_a_folder_in_place_of_a_file_is_named(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    if name != "manifest.json":
        write_manifest(tmp_path, new_manifest({}, {}))
    assert name in refused(capsys, command, tmp_path, *(["--prompt", "x"] if command == "generate" else []))


def deny(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make reading ``path`` fail as it does for another user, whoever runs the test."""
    real = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)  # what reads a text opens it by this too


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n')
    deny(file, monkeypatch)
    options = [
        "--set",
        "partition.scheme=iid",
        "--set",
        "partition.column=",
        "--set",
        "partition.categories_per_client=",
    ]
    line = refused(capsys, "run", "demo", "--set", f"data.path={file}", *options, "--out", tmp_path / "run")
    assert "rows.jsonl" in line
    assert "ermission denied" in line
    template = tmp_path / "own.toml"
    template.write_text("")
    deny(template, monkeypatch)
    with pytest.raises(DataError, match=r"own\.toml: expected a template that can be read, got Permission denied"):
        load_template(template)


@pytest.mark.parametrize("content", [b'with_input = "\xff"', b"a = " + b"[" * 100_000], ids=["bytes", "nested"])
def test_a_template_that_is_no_text_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.toml").write_bytes(content)
    with pytest.raises(DataError, match=r"own\.toml: expected (UTF-8 text|TOML)"):
        load_template(tmp_path / "own.toml")


@pytest.mark.parametrize("placeholder", ["{instruction:d}", "{instruction:>999999999}", "{instruction!r}"])
def test_a_template_asks_for_a_fields_text_and_no_more(tmp_path: Path, placeholder: str) -> None:
    own = (resources.files("fedloom.data") / "wording" / "alpaca.toml").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(own.replace("{instruction}", placeholder), encoding="utf-8")
    with pytest.raises(DataError, match=r"own\.toml, entry \w+: expected placeholders by name only"):
        load_template(tmp_path / "own.toml")


@pytest.mark.parametrize("value", ["x", [1], {}, None, 1.5])
def test_a_configuration_of_wrong_types_is_named(
    tmp_path: Path, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(embedded.model_path(), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": value}))
    with pytest.raises(ModelError, match=r"config\.json is not a model's configuration"):
        load_base(base, device="cpu")
    assert "model.base" in refused(capsys, "describe", "demo", "--set", f"model.base={base}")


@pytest.mark.parametrize("content", [b"\xff\n", b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n", b'{"round": 1\n'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "comparison.json"
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"comparison\.json: expected JSON, got"):
        durable.read_json(file)


@pytest.mark.parametrize("rows", [[2**70], [-(2**70)], [None], "ab", {}, [1.5e300], [[0]]], ids=str)
def test_rows_that_are_no_row_numbers_are_refused_in_a_partition(tmp_path: Path, rows: object) -> None:
    file = tmp_path / "partition.json"
    Partition.from_owners(np.array([0, 1, 0]), 2).save(file, "hash")
    document = json.loads(file.read_text())
    document["clients"][0]["rows"] = rows
    file.write_text(json.dumps(document))
    with pytest.raises(PartitionError, match=r"partition\.json"):
        Partition.load(file, "hash")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", "[" * 100_000),
        ("r.toml", "a = " + "[" * 100_000),
        ("r.json", '{"a":' * 100_000),
        ("r.json", "9" * 5000),
    ],
)
def test_a_recipe_nested_beyond_reason_is_one_line(
    tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert name in refused(capsys, "validate", tmp_path / name)


def test_an_override_nested_beyond_reason_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run.seed" in refused(capsys, "validate", "demo", "--set", "run.seed=" + "[" * 5000)


def shell(command: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    program = f"{sys.executable} -m fedloom"
    return subprocess.run(
        ["sh", "-c", command.replace("fedloom", program, 1)],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


BUFFERING = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
"""What is buffered is written, and may fail, when a command has ended; a container often sets the other."""


@BUFFERING
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "fedloom recipes > /dev/full",
            "standard output: expected a place for the result, got: no space left on device",
        ),
        ("fedloom --help > /dev/full", "no space left on device"),
        ("fedloom recipes >&-", "standard output is closed"),
    ],
)
def test_a_standard_output_that_takes_nothing_is_one_line(command: str, message: str, unbuffered: str) -> None:
    done = shell(command, unbuffered)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@BUFFERING
@pytest.mark.parametrize("command", ["fedloom recipes | true", "fedloom --help | true"])
def test_a_reader_that_has_seen_enough_is_no_mistake(command: str, unbuffered: str) -> None:
    assert shell(command, unbuffered).stderr == ""


def test_a_log_that_takes_nothing_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    say("x")
    PlainProgress(sys.stderr).note("x")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC, errno.EISDIR])
def test_a_rust_writers_error_is_explained_by_its_number(number: int) -> None:
    with pytest.raises(RunError, match="cannot write it: "), durable.explained("it", "do"):
        raise RuntimeError(f"I/O error: something (os error {number})")
