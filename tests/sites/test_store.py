"""What a site keeps, in a folder that its owner may remove while it is written to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import RunError
from fedloom.federation.buffers import Buffers
from fedloom.run_folder import durable
from fedloom.sites.store import Ledger, Recall, Store, confirm, confirmation, keep_asked


def keep_all(folder: Path) -> None:
    store = Store(folder, "a-run")
    store.write(Recall(round=1, task="a-task"), Buffers([b"answer"]))
    Ledger(folder).add(task="a-task")
    keep_asked(folder, "a" * 64, b"{}")
    confirm(folder, "a" * 64)


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Remove the folder so many times between its making and the writing of each file."""

    def arrange(times: int) -> None:
        done: dict[Path, int] = {}

        def wrapped(write: Callable[..., None]) -> Callable[..., None]:
            def first_removed(path: Path, *values: Any) -> None:
                done[path] = done.get(path, 0) + 1
                if done[path] <= times:
                    shutil.rmtree(path.parent)
                write(path, *values)

            return first_removed

        for name in ("write_bytes", "append_line"):
            monkeypatch.setattr(durable, name, wrapped(getattr(durable, name)))

    return arrange


def test_a_folder_that_is_removed_while_a_file_is_written_is_made_again(
    removed: Callable[[int], None], tmp_path: Path
) -> None:
    removed(1)
    keep_all(tmp_path / "site")
    # The ledger lies in the folder itself: with it the run's part went, and a site that forgot starts anew.
    assert Store(tmp_path / "site", "a-run").answer("a-task") is None
    assert [entry["task"] for entry in Ledger(tmp_path / "site").entries()] == ["a-task"]
    assert confirmation(tmp_path / "site", "a" * 64).exists()


def test_an_answer_outlives_the_removal_of_its_folder_while_it_is_written(
    removed: Callable[[int], None], tmp_path: Path
) -> None:
    removed(1)
    Store(tmp_path, "a-run").write(Recall(round=1, task="a-task"), Buffers([b"answer"]))
    assert Store(tmp_path, "a-run").answer("a-task") == b"answer"


def test_a_folder_that_is_removed_again_and_again_is_one_line(removed: Callable[[int], None], tmp_path: Path) -> None:
    removed(99)
    with pytest.raises(RunError, match="its folder is removed while the site runs; leave it in place"):
        Store(tmp_path, "a-run").write(Recall(), Buffers([b"answer"]))
