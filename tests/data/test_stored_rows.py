"""Rows that stay in their file are the rows that are read from it, and a file that changes is refused."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.data import sources
from fedloom.data.encoding import encode
from fedloom.data.json_rows import read_json_lines
from fedloom.data.records import read_records
from fedloom.data.sources import Rows, load_rows
from fedloom.data.stored_rows import ChosenRows, StoredRows
from fedloom.data.tokenizer import byte_tokenizer
from fedloom.errors import DataError

ROWS = [{"instruction": f"what is {n}", "context": "", "response": f"number {n} é"} for n in range(5)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write rows with a byte-order mark, empty lines and both ends of lines."""
    path, lines = tmp_path / "rows.jsonl", [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(("\ufeff" + "\n".join(lines[:2]) + "\n\n  \n" + "\r\n".join(lines[2:])).encode())
    return path


@pytest.fixture
def stored(file: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Return the rows of a file that counts as large."""
    monkeypatch.setattr(sources, "STORED_FROM_BYTES", 1)
    rows = load_rows(file)
    assert isinstance(rows.rows, StoredRows)
    return rows


def test_stored_rows_are_those_that_are_held(stored: Rows, file: Path) -> None:
    assert list(stored.rows) == [row for _, row in read_json_lines(file)] == ROWS
    assert stored.numbers.tolist() == [number for number, _ in read_json_lines(file)] == [1, 2, 5, 6, 7]
    assert stored.where(2) == "rows.jsonl line 5"
    assert stored.rows[-1] == ROWS[-1]
    assert list(stored.rows[1:3]) == ROWS[1:3]
    with pytest.raises(IndexError):
        stored.rows[5]


def test_chosen_rows_are_chosen_again_without_a_copy(stored: Rows) -> None:
    chosen = stored.select([4, 1, 0]).select([2, 0])
    assert isinstance(chosen.rows, ChosenRows)
    assert list(chosen.rows) == [ROWS[0], ROWS[4]] == [chosen.rows[0], chosen.rows[1]]
    assert list(chosen.rows[1:]) == [ROWS[4]]
    assert chosen.numbers.tolist() == [1, 7]
    assert chosen.column("response") == ["number 0 é", "number 4 é"]


def test_tokens_of_stored_rows_are_those_of_held_ones(stored: Rows) -> None:
    held = Rows(list(stored.rows), stored.files, stored.file_of_row, stored.numbers)
    longest = int(encode(read_records(held, "dolly"), byte_tokenizer(), template="plain").tokens.lengths.max())
    policies: list[dict[str, Any]] = [{}, {"max_length": longest - 3, "overlong": "truncate"}, {"loss_on": "all"}]
    for policy in policies:
        found = [
            encode(read_records(rows, "dolly"), byte_tokenizer(), template="plain", **policy) for rows in (stored, held)
        ]
        assert found[0].tokens.sha256() == found[1].tokens.sha256()
        assert np.array_equal(found[0].kept, found[1].kept)
        assert found[0].counts == found[1].counts


def test_a_file_that_takes_its_place_is_not_seen(stored: Rows, file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_text('{"instruction": "x", "response": "y"}\n')
    other.replace(file)
    assert stored.rows[0] == ROWS[0]


def test_a_file_that_grows_is_refused(stored: Rows, file: Path) -> None:
    with file.open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: expected the file as it was when its rows were read"):
        stored.rows[0]


@pytest.mark.parametrize(("bad", "told"), [(b"[1]", "line 8"), (b'{"a": 1, "a": 2}', "twice"), (b"\xff", "UTF-8")])
def test_a_bad_line_is_named_at_once(bad: bytes, told: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STORED_FROM_BYTES", 1)
    file.write_bytes(file.read_bytes() + b"\n" + bad)
    with pytest.raises(DataError, match=told):
        load_rows(file)


def test_a_row_that_lacks_a_column_is_named_as_a_held_one_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(file.read_bytes() + b'\n{"instruction": "x"}')
    messages = []
    for limit in (1 << 26, 1):
        monkeypatch.setattr(sources, "STORED_FROM_BYTES", limit)
        with pytest.raises(DataError) as caught:
            read_records(load_rows(file), "dolly")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "line 8" in messages[0]


def test_the_file_is_let_go_of(file: Path) -> None:
    held = Path("/proc/self/fd")
    if not held.exists():
        pytest.skip("no /proc")
    gc.collect()
    before = len(list(held.iterdir()))
    rows = StoredRows(file)
    del rows
    gc.collect()
    assert len(list(held.iterdir())) == before
