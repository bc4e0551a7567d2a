from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest

from fedloom.data import Split, load_rows
from fedloom.errors import DataError

ROWS = [{"instruction": "when", "output": "2019-05-03"}, {"instruction": "how many", "output": "007"}]


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS)),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("a.csv", "instruction,output\nwhen,2019-05-03\n\nhow many,007\n"),
        ("a.tsv", "instruction\toutput\nwhen\t2019-05-03\nhow many\t007\n"),
    ],
)
def test_every_text_kind_gives_the_same_rows_with_values_untouched(tmp_path: Path, name: str, text: str) -> None:
    assert list(load_rows(_write(tmp_path / name, text)).rows) == ROWS


def test_parquet_is_read_through_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    rows = load_rows(tmp_path / "a.parquet")
    assert list(rows.rows) == ROWS
    assert rows.where(1) == "a.parquet row 2"


def test_words_that_mean_missing_elsewhere_stay_words_in_csv(tmp_path: Path) -> None:
    rows = load_rows(_write(tmp_path / "a.csv", 'mr,ref\nNone,NA\nnull,""\n'))
    assert list(rows.rows) == [{"mr": "None", "ref": "NA"}, {"mr": "null", "ref": ""}]


def test_a_row_of_csv_is_found_by_the_line_it_begins_on(tmp_path: Path) -> None:
    rows = load_rows(_write(tmp_path / "a.csv", 'mr,ref\n"two\nlines",x\nb,y\n'))
    assert [rows.where(0), rows.where(1)] == ["a.csv line 2", "a.csv line 4"]


def test_client_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for client in (10, 2, 0):
        _write(tmp_path / f"local_training_{client}.json", json.dumps([{"a": client}]))
    _write(tmp_path / "global_test.json", json.dumps([{"a": "test"}] * 3))
    rows = load_rows(tmp_path)
    assert rows.column("a") == [0, 2, 10]
    assert rows.client_of_file() == ["0", "2", "10"]
    assert len(load_rows(tmp_path, Split.TEST)) == 3


def test_a_folder_with_named_splits_gives_only_the_split_asked_for(tmp_path: Path) -> None:
    for name in ("trainset", "devset", "testset"):
        _write(tmp_path / f"{name}.csv", f"mr\n{name}\n")
    assert [load_rows(tmp_path, split).column("mr") for split in Split] == [["trainset"], ["devset"], ["testset"]]


def test_a_folder_with_tests_only_gives_no_training_rows(tmp_path: Path) -> None:
    _write(tmp_path / "testset.csv", "mr\nx\n")
    with pytest.raises(DataError, match="expected files of the train split"):
        load_rows(tmp_path)


def test_selected_rows_keep_their_place(tmp_path: Path) -> None:
    rows = load_rows(_write(tmp_path / "a.json", json.dumps(ROWS))).select(np.array([1]))
    assert rows.column("output") == ["007"]
    assert rows.where(0) == "a.json row 2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cut.json", '[{"a": "b"}, {"a": ', r"cut.json line 1 column \d+: expected JSON"),
        ("bad.jsonl", '{"a": 1}\n{"a": \n', "bad.jsonl line 2: expected one JSON object per line"),
        (
            "comma.json",
            '[{"a": 1} {"a": 2}]',
            r"comma.json line 1 column 11: expected JSON, got Expecting ',' delimiter",
        ),
        ("more.json", '[{"a": 1}] x', "more.json line 1 column 12: expected JSON, got Extra data"),
        ("more.jsonl", '{"a": 1} {"b": 2}', "more.jsonl line 1: .* got Extra data at column 10"),
        ("twice.json", '[{"a": 1}, {"b": {"a": 1, "a": 2}}]', "twice.json row 2: .* got 'a' twice"),
        ("twice.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "twice.jsonl line 2: expected every key once .* got 'a' twice"),
        ("twice.csv", "instruction,response,response\n1,2,3\n", "twice.csv line 1: .* got 'response' twice"),
        ("inf.jsonl", '{"a": -Infinity}', "inf.jsonl line 1: expected JSON, got -Infinity"),
        (
            "half.json",
            '[{"a": "\\ud83d\\ude00"}, {"a": ["b\\uD800"]}]',
            r"half.json row 2: expected text, got '.ud800'",
        ),
        ("half.jsonl", '{"a": "b\\ude00"}', r"half.jsonl line 1: expected text, got '.ude00'"),
        ("list.json", "[1, 2]", "list.json row 1: expected an object"),
        ("wide.csv", "mr,ref\n1,2,3\n", r"wide.csv line 2: expected 2 values \(mr, ref\), got 3"),
        ("open.csv", 'mr,ref\n"a,b\n', "open.csv line 2: expected CSV"),
        ("empty.json", "[]", "empty.json: expected rows, found none"),
        ("empty.csv", "mr,ref\n", "empty.csv: expected rows, found none"),
        ("not.parquet", "text", "not.parquet: expected a Parquet file"),
        ("a.xml", "<a/>", "expected one of .json"),
        ("a.jsonl.gz", "", "got '.gz'; unpack the file"),
        ("semicolons.csv", "mr;ref\na;b\n", "line 1: .* separated by commas, got 'mr;ref', as if by semicolons; write"),
        ("tabs.csv", "mr\tref\na\tb\n", "as if by tabs; rename the file to .tsv"),
        ("commas.tsv", "mr,ref\na,b\n", "as if by commas; rename the file to .csv"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(_write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_value_that_pandas_writes_for_a_missing_one_is_missing(tmp_path: Path, name: str) -> None:
    text = '{"instruction": "i", "output": NaN}'
    rows = load_rows(_write(tmp_path / name, f"[{text}]" if name == "a.json" else text))
    assert list(rows.rows) == [{"instruction": "i", "output": None}]


def test_a_column_of_a_csv_file_may_be_the_only_one(tmp_path: Path) -> None:
    assert list(load_rows(_write(tmp_path / "a.csv", "text\na;b\n")).rows) == [{"text": "a;b"}]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="runs the command that the message gives")
@pytest.mark.parametrize("name", ["a b.csv", "a b.json", "a b.jsonl", "a b.txt"])
@pytest.mark.parametrize(
    ("encoding", "found"), [("utf-16", "UTF-16 by its first two bytes"), ("latin-1", "the byte 0xe9 at position 26")]
)
def test_a_file_in_another_encoding_is_told_with_what_converts_it(
    tmp_path: Path, name: str, encoding: str, found: str
) -> None:
    file = tmp_path / name
    file.write_bytes('{"instruction": "i"}\n{"caf\u00e9": 1}\n'.encode(encoding))
    with pytest.raises(DataError, match=f"expected UTF-8 text, got {found}; convert the file") as refused:
        load_rows(file)
    command = str(refused.value).partition("by iconv ")[2].replace("ENCODING", "ISO-8859-1")
    subprocess.run(f"iconv {command.replace('NEW', shlex.quote(str(tmp_path / 'new')))}", shell=True, check=True)
    assert (tmp_path / "new").read_text(encoding="utf-8") == file.read_text(encoding=encoding)


@pytest.mark.parametrize("path", ["absent.json", "./absent", "a/b/c"])
def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="found nothing; check the path"):
        load_rows(path)


def test_a_hub_name_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(name: str, subset: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("someone/data", Split.EVAL, revision="abc")
    assert (list(rows.rows), rows.where(0)) == (ROWS, "someone/data[validation] row 1")
    assert asked == [("someone/data", None, "validation", "abc")]
    with pytest.raises(DataError, match="expected a split called test"):
        load_rows("someone/data", Split.TEST)


def test_a_hub_that_does_not_answer_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(DataError, match=r"data.path: .* got 'someone/data', .* the hub does not answer; check"):
        load_rows("someone/data")


@pytest.mark.data
def test_real_folders_have_the_published_numbers_of_rows(data_dir: Path) -> None:
    dolly = load_rows(data_dir / "instruct" / "dolly15k_10clients")
    assert (len(dolly), len(dolly.files)) == (14_931, 10)
    assert len(load_rows(data_dir / "instruct" / "dolly15k_10clients", Split.TEST)) == 80
    assert len(load_rows(data_dir / "instruct" / "natural_instructions").files) == 32
    assert [len(load_rows(data_dir / "e2e" / f)) for f in ("trainset.csv", "devset.csv", "testset_w_refs.csv")] == [
        42_061,
        4_672,
        4_693,
    ]
