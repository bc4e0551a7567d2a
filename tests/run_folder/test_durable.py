"""Files written in one step."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedloom.errors import RunError, UpdateError
from fedloom.run_folder import durable


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    durable.write_json(path, {"round": 1})
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(OSError, match="No space"):
        durable.write_json(path, {"round": 2})
    assert durable.read_json(path) == {"round": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_json_holds_plain_values_and_writes_what_is_not_finite_as_null() -> None:
    @dataclass(frozen=True)
    class Cost:
        upload_bytes: int
        where: Path

    value = {1: (np.float32(0.5), np.int64(3), np.arange(2), math.inf, math.nan), "cost": Cost(7, Path("a/b"))}
    assert (
        durable.encode_json(value) == '{"1": [0.5, 3, [0, 1], null, null], "cost": {"upload_bytes": 7, "where": "a/b"}}'
    )


def test_json_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(TypeError, match="got object"):
        durable.encode_json({"a": object()})


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    value = float(np.nextafter(0.1, 1.0))
    durable.write_json(tmp_path / "x.json", value)
    assert durable.read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json: expected JSON"):
        durable.read_json(path)


def test_discard_removes_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "link").symlink_to(kept)
    durable.discard(tmp_path / "link")
    assert (kept / "file").exists()
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: ... (os error 28)")]
)
def test_a_full_disk_is_one_line(error: Exception) -> None:
    with pytest.raises(RunError, match="cannot write runs/x: the disk is full; free space"):
        _raise(error)


def test_a_refusal_says_why() -> None:
    with pytest.raises(RunError, match="permission denied"):
        _raise(PermissionError(errno.EACCES, "Permission denied"))


@pytest.mark.parametrize("error", [UpdateError("own"), KeyError("bug"), FileNotFoundError(errno.ENOENT, "bug")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)):
        _raise(error)


def _raise(error: Exception) -> None:
    with durable.explained("runs/x", "free space"):
        raise error


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
