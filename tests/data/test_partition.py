from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedloom.data import Partition
from fedloom.errors import PartitionError

PARTITION = Partition.from_owners(np.array([1, 0, 1, 1]), ["first", "second"], {"scheme": "natural"})


def test_clients_own_the_rows_that_name_them() -> None:
    assert [PARTITION.rows_of(k).tolist() for k in range(2)] == [[1], [0, 2, 3]]
    assert PARTITION.owner_of_row().tolist() == [1, 0, 1, 1]
    assert (PARTITION.num_clients, PARTITION.num_rows, PARTITION.sizes.tolist()) == (2, 4, [1, 3])


def test_a_saved_partition_comes_back_and_leaves_no_other_file(tmp_path: Path) -> None:
    PARTITION.save(tmp_path / "partition.json", "abc")
    loaded = Partition.load(tmp_path / "partition.json", "abc")
    assert (loaded.names, loaded.how) == (PARTITION.names, PARTITION.how)
    assert np.array_equal(loaded.rows, PARTITION.rows)
    assert [file.name for file in tmp_path.iterdir()] == ["partition.json"]


def test_a_saved_partition_keeps_the_order_of_its_clients(tmp_path: Path) -> None:
    Partition.from_owners(np.array([0, 1]), ["z", "10"]).save(tmp_path / "partition.json", "abc")
    assert Partition.load(tmp_path / "partition.json", "abc").names == ("z", "10")


def test_a_partition_of_other_data_is_refused(tmp_path: Path) -> None:
    PARTITION.save(tmp_path / "partition.json", "a" * 64)
    with pytest.raises(PartitionError, match=r"\(sha256 aaaaaaaaaaaa\), got rows with bbbbbbbbbbbb; "):
        Partition.load(tmp_path / "partition.json", "b" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["clients"][0]["rows"].append(0), "exactly one client"),
        (lambda d: d["clients"][1]["rows"].remove(3), "expected 4 rows, its clients own 3"),
        (lambda d: d["clients"][1]["rows"].remove(0), "exactly one client"),
        (lambda d: d["clients"][0]["rows"].clear(), r"1 have none \(client first\)"),
        (lambda d: d["clients"].clear(), "at least one client"),
        (lambda d: d["clients"][0].update(name="second"), "two share one"),
        (lambda d: d.pop("clients"), "clients"),
        (lambda d: d.update(format="other"), "got format 'other'"),
    ],
)
def test_a_partition_file_that_was_changed_is_refused(tmp_path: Path, change: object, message: str) -> None:
    file = tmp_path / "partition.json"
    PARTITION.save(file, "abc")
    document = json.loads(file.read_text())
    change(document)  # type: ignore[operator]
    file.write_text(json.dumps(document))
    with pytest.raises(PartitionError, match=message):
        Partition.load(file, "abc")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_file_that_is_no_partition_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "partition.json").write_text(text)
    with pytest.raises(PartitionError, match="expected"):
        Partition.load(tmp_path / "partition.json", "abc")


def test_an_empty_client_is_refused_with_the_counts() -> None:
    with pytest.raises(PartitionError, match=r"each of 3 clients, 1 have none \(client 1\) of 2 rows; lower"):
        Partition.from_owners(np.array([0, 2]), 3)
