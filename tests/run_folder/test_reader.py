"""Run folders as read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.run_folder.reader import check_result_folder, find_runs, read_run


def test_a_stored_run_says_what_it_is(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run("flora", seed=2, num_rounds=3))
    assert (run.method, run.seed, len(run.records), len(run.evaluations())) == ("flora", 2, 3, 3)
    assert run.finished is not None
    assert run.adapter_folder == run.path / "adapter"
    assert sum(run.holdings[0].rows_by_group.values()) == run.holdings[0].num_rows


def test_a_folder_of_runs_and_a_whole_model_are_told_for_what_they_are(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_run("fedit")
    with pytest.raises(RunError, match=rf"as {path}, or compare all: fedloom report") as refused:
        check_result_folder(path.parent)
    with pytest.raises(RunError, match=rf"without manifest.json; name one of the runs in it, as {path}$"):
        read_run(path.parent)
    assert shlex.split(str(refused.value).partition("all: ")[2]) == ["fedloom", "report", str(path.parent)]
    model = tmp_path / "whole"
    model.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (model / name).touch()
    with pytest.raises(RunError, match="this is a whole model: give it as --base"):
        check_result_folder(model)


def test_a_run_that_goes_on_can_be_read(make_run: Callable[..., Path]) -> None:
    path = make_run("fedit", finish="no")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 7, "ev')
    run = read_run(path)
    assert run.finished is None
    assert len(run.records) == 6


def test_a_comparison_is_the_runs_inside_it(comparison: Path) -> None:
    assert len(find_runs(comparison)) == 12
    assert find_runs(comparison / "flora-seed1") == [comparison / "flora-seed1"]


def test_what_is_no_run_is_named(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    with pytest.raises(RunError, match=r"expected a run folder, .* found no folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(RunError, match="found one without manifest"):
        read_run(tmp_path)
    with pytest.raises(RunError, match="found no run in it"):
        find_runs(tmp_path)
    path = make_run("fedit", num_rounds=1)
    (path / "holdings.json").write_text(json.dumps({"clients": [{"name": "0"}]}))
    with pytest.raises(RunError, match=r"holdings\.json: expected what the run wrote"):
        read_run(path)
