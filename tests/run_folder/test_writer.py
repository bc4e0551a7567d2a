"""The run folder: created, resumed, refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import RunError
from fedloom.run_folder.manifest import read_manifest
from fedloom.run_folder.writer import RunFolder

CONFIG = {"run": {"seed": 1, "out": "x"}, "federation": {"num_rounds": 3}, "method": {"name": "fedit", "ranks": (4, 8)}}
IDENTITY = {"base_sha256": "aa", "data_sha256": "bb"}


@contextmanager
def opened(path: Path, config: dict[str, Any] = CONFIG, fresh: bool = False, **identity: str) -> Iterator[RunFolder]:
    with RunFolder.open(path, config, {**IDENTITY, **identity}, fresh=fresh) as folder:
        yield folder


def with_rounds(path: Path, num_rounds: int) -> None:
    with opened(path) as folder:
        for n in range(1, num_rounds + 1):
            folder.write_round(n, {"loss_nats": 1 / n}, {"state/server": bytes([n])})


def test_a_new_run_records_settings_versions_and_hashes(tmp_path: Path) -> None:
    with opened(tmp_path / "x") as folder:
        assert folder.last_round() is None
        assert folder.read_json("config.json")["method"] == {"name": "fedit", "ranks": [4, 8]}
    manifest = read_manifest(tmp_path / "x")
    assert manifest["identity"] == IDENTITY
    assert {"python", "fedloom", "torch", "transformers", "peft"} <= manifest["sessions"][0]["versions"].keys()


def test_a_round_holds_its_record_files_and_what_the_writers_wrote(tmp_path: Path) -> None:
    def write_adapter(path: Path) -> None:
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")

    with opened(tmp_path) as folder:
        folder.write_round(1, {"loss_nats": 0.5}, {"state/server": b"s"}, {"clients/3": write_adapter})
        assert folder.round_files(1).read("state/server") == b"s"
        assert (folder.round_path(1) / "clients/3/adapter_config.json").exists()
        assert folder.records() == [{"round": 1, "loss_nats": 0.5}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"round": 1, "loss_nats": 0.5}


def test_the_same_command_resumes_after_the_last_round(tmp_path: Path) -> None:
    with_rounds(tmp_path, 2)
    with opened(tmp_path) as folder:
        assert folder.last_round() == 2
        folder.write_round(3, {"loss_nats": 0.1})
        assert [record["round"] for record in folder.records()] == [1, 2, 3]
        assert [session["num_rounds_done"] for session in folder.manifest["sessions"]] == [0, 2]


def test_a_round_is_written_once(tmp_path: Path) -> None:
    with_rounds(tmp_path, 2)
    with opened(tmp_path) as folder, pytest.raises(RunError, match="expected the next round to be 3, got 2"):
        folder.write_round(2, {})


def test_metrics_lose_half_a_line_and_what_did_not_complete_and_regain_what_did(tmp_path: Path) -> None:
    with_rounds(tmp_path, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + '{"round": 9}\n' + lines[2][:5])
    with opened(tmp_path) as folder:
        assert [record["round"] for record in folder.records()] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)


def test_rounds_removed_by_hand_roll_the_run_back(tmp_path: Path) -> None:
    with_rounds(tmp_path, 3)
    (tmp_path / "rounds/3").rename(tmp_path.parent / "elsewhere")
    with opened(tmp_path) as folder:
        assert folder.last_round() == 2
        assert len(folder.records()) == 2


def test_other_settings_are_refused_by_name_with_both_values(tmp_path: Path) -> None:
    with_rounds(tmp_path, 1)
    other = {**CONFIG, "method": {"name": "flora", "ranks": (4, 8)}, "run": {"seed": 2, "out": "x"}}
    expected = r"method\.name is 'fedit' there, 'flora' asked; run\.seed is 1 there, 2 asked.*--fresh"
    with pytest.raises(RunError, match=expected), opened(tmp_path, other):
        pass
    other = {**CONFIG, "evaluation": {"patience": 3, "beside": True}}
    expected = r"evaluation\.beside is not set there, true asked; evaluation\.patience is not set there, 3 asked"
    with pytest.raises(RunError, match=expected), opened(tmp_path, other):
        pass


def test_a_run_may_be_extended_and_is_then_no_longer_finished(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.write_round(1, {})
        folder.finish({"seconds": 1.0})
        assert folder.finished == {"round": 1, "seconds": 1.0}
    with opened(tmp_path, {**CONFIG, "federation": {"num_rounds": 5}}) as folder:
        assert folder.finished is not None
        folder.write_round(2, {})
        assert folder.finished is None
    assert json.loads((tmp_path / "config.json").read_text())["federation"]["num_rounds"] == 5


def test_another_base_is_refused_at_opening_and_when_it_becomes_known(tmp_path: Path) -> None:
    with_rounds(tmp_path, 1)
    expected = "base_sha256 is 'aa' there, 'cc' asked"
    with pytest.raises(RunError, match=expected), opened(tmp_path, base_sha256="cc"):
        pass
    with opened(tmp_path) as folder, pytest.raises(RunError, match=expected):
        folder.confirm_identity(base_sha256="cc")


def test_a_hash_that_becomes_known_later_is_recorded_once(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.confirm_identity(partition_sha256="dd")
        folder.write_round(1, {})
    with opened(tmp_path) as folder, pytest.raises(RunError, match="partition_sha256 is 'dd' there, 'ee' asked"):
        folder.confirm_identity(partition_sha256="ee")


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "config.json", "rounds", "manifest.json"])
def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path, name: str, fresh: bool) -> None:
    (tmp_path / name).write_text('{"format": "other"}')
    with pytest.raises(RunError, match="choose another folder"), opened(tmp_path, fresh=fresh):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(RunError, match="x: expected a folder for the run, got a file"), opened(tmp_path / "x"):
        pass
    with pytest.raises(RunError, match=r"cannot write .*not a directory"), opened(tmp_path / "x" / "y"):
        pass


def test_fresh_removes_the_run_and_leaves_what_others_put_there(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    with_rounds(tmp_path / "x", 2)
    (tmp_path / "x/notes.txt").touch()
    (tmp_path / "x/rounds/2/link").symlink_to(outside)
    with opened(tmp_path / "x", {**CONFIG, "method": {"name": "flora"}}, fresh=True, base_sha256="cc") as folder:
        assert folder.last_round() is None
        assert folder.records() == []
    assert (tmp_path / "x/notes.txt").exists()
    assert (outside / "file").exists()
    assert not list((tmp_path / "x").glob(".tmp-*"))


def test_two_processes_cannot_hold_one_folder(tmp_path: Path) -> None:
    with opened(tmp_path):
        with (
            pytest.raises(RunError, match=r"no other process uses, process \d+ does"),
            opened(tmp_path),
        ):
            pass
        with pytest.raises(RunError, match="no other process uses"), opened(tmp_path, fresh=True):
            pass
    with opened(tmp_path):
        pass


def test_pruning_keeps_the_last_states_and_every_record(tmp_path: Path) -> None:
    with_rounds(tmp_path, 4)
    with opened(tmp_path) as folder:
        folder.prune(keep=2)
        assert folder.round_files(3).read("state/server") == b"\x03"
        with pytest.raises(RunError, match=r"rounds/2/state/server: expected a file that the run wrote"):
            folder.round_files(2).read("state/server")
        assert len(folder.records()) == 4
        with pytest.raises(ValueError, match="at least 1"):
            folder.prune(keep=0)


def test_a_folder_entry_is_replaced_as_a_whole(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.write_folder("adapter", lambda path: (path / "old").touch())
        folder.write_folder("adapter", lambda path: (path / "new").touch())
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["new"]


def test_a_full_disk_loses_no_completed_round_and_leaves_no_debris(tmp_path: Path) -> None:
    with_rounds(tmp_path, 2)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as folder:
        with pytest.raises(RunError, match=r"cannot write .*rounds/3: the disk is full; the run is kept"):
            folder.write_round(3, {}, {"state/server": b"s"}, {"global": full})
        assert folder.last_round() == 2
        assert not list(tmp_path.glob(".tmp-*"))
        folder.write_round(3, {})


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        for name in ("../x", "/etc/x"):
            with pytest.raises(ValueError, match="inside the run folder"):
                folder.write_round(1, {}, {name: b""})
        with pytest.raises(ValueError, match="expected an entry of the run folder"):
            folder.write_json("notes.json", {})
        assert folder.last_round() is None
