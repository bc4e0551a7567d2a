"""The number of threads decides how sums round: it is a setting, is recorded, and its change is told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.config import Settings
from fedloom.experiment import run
from fedloom.reporting.progress import PlainProgress
from fedloom.results.opened_result import open_result

Make = Callable[..., Settings]


@pytest.fixture(autouse=True)
def threads_of_this_process() -> Iterator[None]:
    """Put the number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings_for(settings_for: Make) -> Make:
    """Make settings of as little training as there is: threads that wait for each other cost time on a busy machine."""
    small: dict[str, Any] = {"federation__num_rounds": 1, "training__local_steps": 1, "training__batch_size": 1}
    return lambda **changes: settings_for(**small | {"data__eval_rows": 1} | changes)


def notes_of(settings: Settings, out: Path) -> str:
    stream = io.StringIO()
    run(settings, out, progress=PlainProgress(stream))
    return stream.getvalue()


def threads_recorded(out: Path) -> list[int | None]:
    return [session.get("threads") for session in json.loads((out / "manifest.json").read_text())["sessions"]]


def test_a_run_computes_with_its_own_number_of_threads_whatever_the_process_had(
    settings_for: Make, tmp_path: Path
) -> None:
    torch.set_num_threads(3)
    run(settings_for(), tmp_path / "run")
    assert torch.get_num_threads() == 1
    run(settings_for(engine__threads=2), tmp_path / "other")
    assert torch.get_num_threads() == 2
    assert threads_recorded(tmp_path / "run") == [1]
    assert threads_recorded(tmp_path / "other") == [2]


def test_a_run_resumed_with_another_number_of_threads_says_what_that_changes_and_goes_on(
    settings_for: Make, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert "threads" not in notes_of(settings_for(federation__num_rounds=1), out)
    assert "threads" not in notes_of(settings_for(federation__num_rounds=2), out)
    told = notes_of(settings_for(federation__num_rounds=3, engine__threads=2), out).splitlines()
    (line,) = [line for line in told if "threads" in line]
    assert line.startswith("engine.threads is 2 now; for the rounds before it was 1.")
    assert threads_recorded(out) == [1, 1, 2]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_result_is_opened_with_the_threads_of_its_run(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(engine__threads=2), tmp_path / "run")
    torch.set_num_threads(3)
    open_result(tmp_path / "run")
    assert torch.get_num_threads() == 2
    open_result(tmp_path / "run/adapter", tokenizer="bytes")
    assert torch.get_num_threads() == 1
