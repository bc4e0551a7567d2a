"""Runs of a comparison at once: the results of one after another, named lines, one error, and nothing left running."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedloom.config import Settings
from fedloom.errors import RunError, SettingsError
from fedloom.experiment import compare, comparison
from fedloom.experiment.parallel_runs import run_in_processes
from fedloom.preview import runs_at_once
from fedloom.preview.description import memory_of
from fedloom.preview.row_sample import rows_here
from fedloom.preview.runs_at_once import PROCESS_BYTES, SHARE_OF_FREE
from fedloom.reporting.progress import PlainProgress, SilentProgress

Make = Callable[..., Settings]


def kept(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.slow
def test_runs_at_once_come_to_the_results_of_one_after_another(settings_for: Make, tmp_path: Path) -> None:
    stream = io.StringIO()
    alone = compare(settings_for(), ["flora", "base"], [1, 2], tmp_path / "alone")
    at_once = compare(
        settings_for(),
        ["flora", "base"],
        [1, 2],
        tmp_path / "at-once",
        parallel=3,
        progress=PlainProgress(stream),
    )
    assert kept(tmp_path / "at-once") == kept(tmp_path / "alone")
    for one, other in zip(alone.runs, at_once.runs, strict=True):
        assert (one.method, one.seed, one.eval, one.base_eval) == (
            other.method,
            other.seed,
            other.eval,
            other.base_eval,
        )
    assert (tmp_path / "at-once/comparison.json").exists()
    assert "flora-seed2: flora, seed 2: 2 rounds" in stream.getvalue().splitlines()


@pytest.mark.slow
def test_a_run_that_fails_ends_the_others_with_its_own_message(settings_for: Make, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("not a run")
    endless = settings_for(federation__num_rounds=100_000)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RunError, match=r"taken: .*expected a new or empty folder or a run, it holds letter.txt"):
        run_in_processes(
            [(endless, tmp_path / "endless"), (endless, taken)], 2, "2026-01-02", fresh=False, progress=SilentProgress()
        )
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
def test_an_interruption_ends_every_run_and_the_same_command_goes_on(settings_for: Make, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out"
    recipe.write_text(json.dumps(settings_for(federation__num_rounds=200).as_dict()))
    command = [sys.executable, "-m", "fedloom", "compare", str(recipe), "--methods", "flora", "--seeds", "1,2"]
    command += ["--parallel", "2", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not all((out / f"flora-seed{seed}/rounds/2").exists() for seed in (1, 2)):
        time.sleep(0.01)
    theirs = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert told.splitlines()[-1].startswith("interrupted; completed work is saved")
    assert not [one for one in theirs if one.is_running()]
    more = max(len(list((out / f"flora-seed{seed}/rounds").iterdir())) for seed in (1, 2)) + 1
    resumed = [*command, "--set", f"federation.num_rounds={more}"]
    subprocess.run(resumed, check=True, capture_output=True)
    assert (out / f"flora-seed2/rounds/{more}").exists()


def test_no_more_runs_begin_than_fit_into_memory(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def run(*given: object, **_: object) -> list[object]:
        begun.append(given[1])
        raise RunError("enough")

    monkeypatch.setattr(comparison, "run_in_processes", run)
    settings = settings_for(method__name="flora")
    each = memory_of(settings, rows_here(settings)).total_bytes + PROCESS_BYTES
    monkeypatch.setattr(runs_at_once, "free_on", lambda _: 2.5 * each / SHARE_OF_FREE)
    told = io.StringIO()
    with pytest.raises(RunError, match="enough"):
        compare(settings_for(), ["flora", "base"], [1, 2], tmp_path / "out", parallel=4, progress=PlainProgress(told))
    assert begun == [2]
    assert "--parallel: expected memory for 4 runs at once" in told.getvalue()


def test_what_cannot_have_a_process_of_its_own_is_refused(settings_for: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--parallel: expected an integer ≥ 1, got 0"):
        compare(settings_for(), ["flora"], [1], tmp_path / "out", parallel=0)
    with pytest.raises(SettingsError, match=r"--parallel: expected engine\.name = local, got ray"):
        compare(settings_for(engine__name="ray"), ["flora"], [1], tmp_path / "out", parallel=2)
    assert not (tmp_path / "out").exists()
