"""The drivers of ``make faults`` find what they are there to find, and a small part of what they try is tried here."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults.cutting_proxy import CuttingProxy
from faults.disk_faults import KILLED
from faults.disk_trials import kills
from faults.forked_commands import forked
from faults.hostile_clients import powers
from faults.mutated_inputs import Reader, readers, tried
from faults.mutations import JSON
from faults.site_bench import WITHOUT_MEMORY, Case, WrongError
from faults.site_soak import Held

from fedloom.errors import DataError


def test_a_process_dies_in_the_middle_of_the_write_that_is_named(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "first").write_text("whole")
        (tmp_path / "second").write_text("four")

    changes = forked(tmp_path, write).changes
    assert changes == ("open first", "write first", "open second", "write second")
    assert forked(tmp_path, write, at=3).code == KILLED
    assert [(tmp_path / name).read_text() for name in ("first", "second")] == ["whole", "fo"]


def test_a_refused_disk_refuses_what_comes_after_too_but_removals(tmp_path: Path) -> None:
    def write() -> None:
        for name in ("first", "second"):
            with pytest.raises(OSError, match="space"):
                (tmp_path / name).write_text("four")
        (tmp_path / "first").unlink()

    assert forked(tmp_path, write, at=1, number=28).code == 0
    assert not (tmp_path / "second").exists()


def test_a_reader_that_crashes_or_believes_is_found() -> None:
    def careless(data: bytes) -> object:
        try:
            return json.loads(data)["a"] + 1
        except ValueError as error:
            raise DataError("no JSON") from error

    found = tried(Reader("careless", [b'{"a": 1}'], careless, JSON), 40)
    assert any("KeyError" in line or "TypeError" in line for line in found.wrong)
    believing = tried(Reader("believing", [b'{"a": 1}'], lambda data: None, JSON, hashed=True), 5)
    assert len(believing.wrong) == believing.total


def test_a_few_mutated_inputs_of_every_reader_are_refused(tmp_path: Path) -> None:
    wrong = [line for reader in readers(tmp_path) for line in tried(reader, 4).wrong]
    assert wrong == []


def test_a_killed_command_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    tallies = kills(tmp_path / "bench", 1, lambda line: None, only=["recipes copy"])
    assert [one.wrong for one in tallies] == [[]]


@pytest.mark.parametrize("method", ["fedit", "rolora"])
def test_a_hostile_client_stays_within_the_bound_on_the_wire(method: str) -> None:
    found = list(powers(method, 0.1))
    assert found
    assert all(one.is_within for one in found)


def test_an_adapter_that_a_replay_does_not_give_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench: Any = SimpleNamespace(root=tmp_path)
    case = Case(bench, tmp_path, WITHOUT_MEMORY, 1, {})
    monkeypatch.setattr(case, "start", lambda *_: SimpleNamespace(wait=lambda: 0))
    clients = [{"name": "oslo", "reason": "did not answer"}]
    for name in ("run", "alone"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "adapter_model.safetensors").write_bytes(b"same")
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"round": 1, "clients": clients}) + "\n")
    case._compare()
    assert f'participation = "{tmp_path / "run"}"' in (tmp_path / "recipe.toml").read_text()
    (tmp_path / "alone" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(WrongError, match="oslo"):
        case._compare()


def test_a_fork_grows_by_what_it_makes_and_not_by_what_it_touches_of_its_parents(tmp_path: Path) -> None:
    size = 20 << 20
    inherited = mmap.mmap(-1, size, mmap.MAP_PRIVATE)

    def touch(memory: mmap.mmap) -> float:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        return Held.by(os.getpid()).memory_mb

    def grow() -> None:
        made = [mmap.mmap(-1, size, flags) for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED)]
        held = [Held.by(os.getpid()).memory_mb, *map(touch, (inherited, *made))]
        (tmp_path / "held").write_text(json.dumps(held))

    touch(inherited)
    assert forked(tmp_path, grow).code == 0
    begin, touched, private, shared = json.loads((tmp_path / "held").read_text())
    assert touched - begin < 2
    assert private - touched > 18
    assert shared - private > 18


def test_the_proxy_carries_holds_back_and_cuts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as heard:
        proxy = CuttingProxy(heard.getsockname()[1])
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as near, heard.accept()[0] as far:
            near.sendall(b"one")
            assert far.recv(10) == b"one"
            proxy.stop()
            near.sendall(b"two")
            far.settimeout(0.2)
            with pytest.raises(TimeoutError):
                far.recv(10)
            far.settimeout(20)
            proxy.go_on()
            assert far.recv(10) == b"two"
            proxy.cut()
            # The end comes as a shutdown and then a reset: the reader may meet either.
            with contextlib.suppress(ConnectionResetError):
                assert far.recv(10) == b""
        proxy.close()
