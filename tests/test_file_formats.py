"""Files that outlive the process: one of another format is refused in one line, and stays as it is."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from example_runs import write_example_run

from fedloom.data.partition import Partition
from fedloom.errors import FedloomError, RunError
from fedloom.evaluation.decoding import DecodingSettings
from fedloom.evaluation.judge.endpoint import Reply
from fedloom.evaluation.judge.verdict_cache import VerdictCache
from fedloom.evaluation.outputs_file import OutputsFile
from fedloom.experiment.comparison import refuse_other_folder
from fedloom.file_formats import DECODED_OUTPUTS, RUN_FOLDER, FileFormat
from fedloom.reporting.tuned import Tuning, read_tuning
from fedloom.run_folder.claim import refuse_another, refuse_foreign
from fedloom.run_folder.reader import read_run
from fedloom.run_folder.writer import RunFolder

NOT_OURS = [99, -1, 0, True, 1.0, None, "1", "later", [1]]


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name in a folder, how one is made, how its number is changed, and everything that opens it.

    ``openers`` take the folder; ``make`` writes the oldest format that is read.
    """

    file: str
    make: Callable[[Path], None]
    stamp: Callable[[Path, object], None]
    openers: tuple[Callable[[Path], object], ...]


def in_json(key: str, pattern: str | None = None) -> Callable[[Path, object], None]:
    """Return a function that sets a key of a file's first line."""

    def stamp(path: Path, number: object) -> None:
        first, end, rest = path.read_text().partition("\n") if path.suffix == ".jsonl" else (path.read_text(), "", "")
        value = number if pattern is None or number is None else pattern.format(number)
        path.write_text(json.dumps({**json.loads(first), key: value}) + end + rest)

    return stamp


def in_sqlite(path: Path, number: object) -> None:
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {number}")
    database.close()


def make_run(folder: Path) -> None:
    write_example_run(folder.parent, "fedit", num_rounds=1).rename(folder)


def make_comparison(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text('{"folder": "x", "table": {}, "runs": []}') and None


def make_partition(folder: Path) -> None:
    clients = [{"name": "0", "rows": [0, 2]}, {"name": "1", "rows": [1]}]
    document = {"format": "fedloom-partition-1", "data_sha256": "abc", "num_rows": 3, "how": {}, "clients": clients}
    (folder / "partition.json").write_text(json.dumps(document))


def make_outputs(folder: Path) -> None:
    header = {"fedloom_outputs": DECODED_OUTPUTS.oldest, "model": "m", "settings": DecodingSettings().__dict__}
    row = {"key": "k", "prompt": "p", "output": "o", "is_cut_off": False}
    row["sha256"] = hashlib.sha256(json.dumps([header, row], sort_keys=True).encode()).hexdigest()
    (folder / "outputs.jsonl").write_text(f'{json.dumps(header)}\n{json.dumps(row)}\n{{"key": "cut')


def make_verdicts(folder: Path) -> None:
    with sqlite3.connect(folder / "verdicts.sqlite") as database:
        database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, replies TEXT NOT NULL)")
        database.execute("INSERT INTO verdicts VALUES ('k', '[[\"8 9\", 1, 2]]')")
    database.close()


def open_verdicts(folder: Path) -> list[Reply] | None:
    with VerdictCache(folder / "verdicts.sqlite") as cache:
        return cache.get("k")


def make_tuning(folder: Path) -> None:
    Tuning(format_version=1, seed=1, fraction=0.1, num_rows=3, methods=[], skipped={}).write(folder)


def open_run(fresh: bool) -> Callable[[Path], object]:
    return lambda path: RunFolder.open(path, json.loads((path / "config.json").read_text()), {}, fresh).close()


KINDS = {
    "run folder": Kind(
        "manifest.json",
        make_run,
        in_json("format_version"),
        (
            read_run,
            open_run(fresh=False),
            open_run(fresh=True),
            refuse_foreign,
            lambda p: refuse_another(p, {}, ("x",)),
        ),
    ),
    "comparison": Kind(
        "comparison.json", make_comparison("comparison.json"), in_json("format_version"), (refuse_other_folder,)
    ),
    "demo": Kind("demo.json", make_comparison("demo.json"), in_json("format_version"), (refuse_other_folder,)),
    "tuning": Kind("tuning.json", make_tuning, in_json("format_version"), (refuse_other_folder, read_tuning)),
    "partition": Kind(
        "partition.json",
        make_partition,
        in_json("format", "fedloom-partition-{}"),
        (lambda folder: Partition.load(folder / "partition.json", "abc"),),
    ),
    "outputs": Kind(
        "outputs.jsonl",
        make_outputs,
        in_json("fedloom_outputs"),
        (lambda folder: OutputsFile.open(folder / "outputs.jsonl", DecodingSettings(), "m"),),
    ),
    "verdicts": Kind("verdicts.sqlite", make_verdicts, in_sqlite, (open_verdicts,)),
}
CASES = [
    (kind, number)
    for kind in KINDS
    for number in NOT_OURS
    # SQLite's number is an integer, and 0 where nobody set it.
    if kind != "verdicts" or (type(number) is int and number != 0)
    # Strings and numbers are written alike in a partition's format.
    if kind != "partition" or number != "1"
]


def made(kind: Kind, folder: Path) -> Path:
    if kind.make is not make_run:
        folder.mkdir()
    kind.make(folder)
    return folder / kind.file


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_file_of_another_format_is_named_with_what_is_read_and_stays_as_it_is(
    name: str, number: object, tmp_path: Path
) -> None:
    kind, folder = KINDS[name], tmp_path / "x"
    file = made(kind, folder)
    kind.stamp(file, number)
    before = contents(folder)
    for opener in kind.openers:
        with pytest.raises(FedloomError) as caught:
            opener(folder)
        message = str(caught.value)
        assert message.startswith(f"{file}: ")
        assert re.search("of formats? [0-9 to]+, which this version of fedloom reads, got format ", message)
        assert str(number) in message.partition("got format")[2]
        assert ("upgrade fedloom" in message) == (number == 99)
        assert any(action in message for action in ("choose another", "make a new", "remove it"))
        assert "\n" not in message
        assert contents(folder) == before


@pytest.mark.parametrize("name", KINDS)
def test_what_the_oldest_format_that_is_read_holds_is_read(name: str, tmp_path: Path) -> None:
    made(KINDS[name], tmp_path / "x")
    for opener in KINDS[name].openers[:2]:
        opener(tmp_path / "x")


@pytest.mark.parametrize("name", ["outputs", "verdicts"])
@pytest.mark.parametrize("content", [b"my notes, without an end of line", b"\xff\xfe\n", b"[1]\n", b"7\n{}\n"])
def test_a_file_of_somebody_else_s_is_refused_and_stays_as_it_is(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / KINDS[name].file
    file.write_bytes(content)
    with pytest.raises(FedloomError, match=r"choose another file|expected one JSON object|name another with --out"):
        KINDS[name].openers[0](tmp_path)
    assert contents(tmp_path) == {file: content}


def test_a_database_of_somebody_else_s_gets_no_table_of_ours(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as database:
        database.execute("CREATE TABLE notes (text TEXT)")
    database.close()
    before = contents(tmp_path)
    with pytest.raises(FedloomError, match=r"expected a cache of verdicts .* got format 0"):
        open_verdicts(tmp_path)
    assert contents(tmp_path) == before


def test_what_is_written_now_is_read_again(tmp_path: Path) -> None:
    with VerdictCache(tmp_path / "verdicts.sqlite") as cache:
        cache.put("k", [Reply("8 9", 1, 2)])
    assert open_verdicts(tmp_path) == [Reply("8 9", 1, 2)]
    OutputsFile.open(tmp_path / "outputs.jsonl", DecodingSettings(), "m").append([("p", "o", False)])
    assert OutputsFile.open(tmp_path / "outputs.jsonl", DecodingSettings(), "m").outputs == {"p": ("o", False)}
    Partition.from_owners(np.array([0, 1, 0]), 2).save(tmp_path / "partition.json", "abc")
    assert Partition.load(tmp_path / "partition.json", "abc").num_rows == 3


def test_a_first_line_that_was_cut_short_is_begun_again(tmp_path: Path) -> None:
    file = tmp_path / "outputs.jsonl"
    OutputsFile.open(file, DecodingSettings(), "m")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    assert OutputsFile.open(file, DecodingSettings(), "m").outputs == {}
    assert file.read_bytes() == whole


def test_a_run_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    file = made(KINDS["run folder"], tmp_path / "x")
    manifest = json.loads(file.read_text())
    manifest["sessions"][-1]["versions"]["fedloom"] = "7.8.9"
    file.write_text(json.dumps({**manifest, "format_version": 9}))
    with pytest.raises(RunError, match=r"got format 9: upgrade fedloom to 7\.8\.9, which wrote it, or "):
        read_run(tmp_path / "x")


@pytest.mark.parametrize("change", [{"sessions": []}, {"sessions": [{}]}, {"sessions": None}, {"identity": [1]}])
def test_a_manifest_without_its_parts_is_damaged(change: dict[str, object], tmp_path: Path) -> None:
    file = made(KINDS["run folder"], tmp_path / "x")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RunError, match=r"manifest\.json: expected what the run wrote, found a damaged file"):
        read_run(tmp_path / "x")


def test_a_resumed_run_has_the_format_of_its_last_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(KINDS["run folder"], tmp_path / "x")
    monkeypatch.setattr("fedloom.run_folder.manifest.RUN_FOLDER", replace(RUN_FOLDER, number=7))
    open_run(fresh=False)(tmp_path / "x")
    assert json.loads(file.read_text())["format_version"] == 7


def test_a_format_that_was_dropped_names_the_last_version_that_reads_it() -> None:
    dropped = FileFormat("partition", 3, "make a new partition", oldest=2, last_read_by={1: "0.4"})
    dropped.check("p.json", 2, RunError)
    with pytest.raises(RunError, match=r"^p\.json: .* of formats 2 to 3, .* got format 1: use fedloom 0\.4"):
        dropped.check("p.json", 1, RunError)
