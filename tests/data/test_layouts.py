from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedloom.data import Partition, Rows, load_rows, natural, write_shepherd
from fedloom.errors import DataError

ROWS = Rows([{"instruction": f"é{i}", "output": str(i)} for i in range(5)], ("a",), np.zeros(5, np.int64), np.arange(5))
PARTITION = Partition.from_owners(np.array([1, 0, 1, 2, 0]), 3)


def test_a_written_folder_reads_back_as_the_same_partition(tmp_path: Path) -> None:
    write_shepherd(tmp_path / "out", ROWS, PARTITION, test=ROWS.select([0]))
    read = load_rows(tmp_path / "out")
    partition = natural(read.client_of_file())
    assert partition.names == ("0", "1", "2")
    for client in range(3):
        owned = [read.rows[i] for i in partition.rows_of(client)]
        assert owned == [ROWS.rows[i] for i in PARTITION.rows_of(client)]
    assert list(load_rows(tmp_path / "out", "test").rows) == [ROWS.rows[0]]
    assert len(load_rows(tmp_path / "out" / "global_training.json")) == 5


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="expected an empty folder"):
        write_shepherd(tmp_path, ROWS, PARTITION)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_named_by_text_is_written_and_a_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    write_shepherd(str(tmp_path / "out"), ROWS, PARTITION)
    taken = tmp_path / "out" / "global_training.json"
    kept = taken.read_bytes()
    for place in (taken, taken / "inside"):
        with pytest.raises(DataError, match="expected a folder to write to, a file is in the way"):
            write_shepherd(str(place), ROWS, PARTITION)
    assert taken.read_bytes() == kept


def test_a_partition_of_other_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a partition of the 2 rows"):
        write_shepherd(tmp_path, ROWS.select([0, 1]), PARTITION)
