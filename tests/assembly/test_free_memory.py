"""Memory that is free here ends where the control group of a container ends, in both versions of Linux's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom.assembly import free_memory as module
from fedloom.assembly.free_memory import free_here

MACHINE = 10_000


def group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of control groups, of which this process is in ``/a/b``."""
    monkeypatch.setattr(module, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(module, "_OWN", tmp_path / "own")
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    (tmp_path / "own").write_text("5:devices:/x\n4:memory:/a/b\n0::/a/b\n", encoding="utf-8")
    return tmp_path / "groups"


TWO, ONE = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_without_a_limit_it_is_what_the_machine_has(root: Path) -> None:
    assert free_here() == MACHINE
    group(root / "a/b", TWO, "max", 9_000, "anon 1")
    assert free_here() == MACHINE


@pytest.mark.parametrize("place", ["a/b", "a", "."])
def test_a_group_or_one_above_it_leaves_its_limit_less_its_use(root: Path, place: str) -> None:
    """Pages of files count as used and are given back when memory is wanted."""
    group(root / place, TWO, "4000", 3_000, "anon 2500\ninactive_file 500")
    assert free_here() == 1_500
    group(root / place, TWO, "4000", 5_000, "inactive_file 0")
    assert free_here() == 0


def test_version_1_counts_the_groups_below(root: Path) -> None:
    group(root / "memory/a/b", ONE, "4000", 3_000, "inactive_file 0\ntotal_inactive_file 700")
    assert free_here() == 1_700
    group(root / "memory", ONE, "1000", 900, "total_inactive_file 0")
    assert free_here() == 100
    group(root / "memory/a/b", ONE, "9223372036854771712", 3_000, "total_inactive_file 0")
    assert free_here() == 100


def test_a_system_without_control_groups_has_no_such_limit(tmp_path: Path) -> None:
    (tmp_path / "own").unlink()
    assert free_here() == MACHINE
