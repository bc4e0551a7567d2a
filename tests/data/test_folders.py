"""Folders of rows with company: what describes rows, what a system left, what ``datasets`` saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.data import load_rows
from fedloom.data.sources import client_names_of_files
from fedloom.errors import DataError

ROWS = [{"prompt": f"{k}?", "completion": "007"} for k in range(3)]


def rows_file(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_infos.json", "._rows.jsonl", ".hidden.json"])
def test_files_that_hold_no_rows_are_passed_over(tmp_path: Path, name: str) -> None:
    (rows_file(tmp_path) / name).write_bytes(b'{"mine": {"file_name": "rows.jsonl"}}\xff')
    assert load_rows(tmp_path).rows == ROWS
    assert client_names_of_files(tmp_path) == ["rows"]


def test_what_datasets_saved_is_read_whole_or_by_split(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "split"))
    whole = load_rows(tmp_path / "one", "test")
    assert list(whole.rows) == ROWS
    assert whole.where(2) == "one row 3"
    assert list(load_rows(tmp_path / "split").rows) == ROWS
    assert list(load_rows(tmp_path / "split", "test").rows) == ROWS[:1]
    with pytest.raises(DataError, match="expected a split called validation"):
        load_rows(tmp_path / "split", "eval")
    (tmp_path / "one/state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="one: expected what datasets wrote with save_to_disk, got"):
        load_rows(tmp_path / "one")
