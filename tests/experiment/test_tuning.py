"""Tuned comparisons: what is chosen, on which rows, after a kill, with other values, and where nothing trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedloom.config import Settings, with_seed
from fedloom.errors import RunError, SettingsError
from fedloom.experiment import compare
from fedloom.experiment.tuning import folder_name
from fedloom.reporting.progress import SilentProgress
from fedloom.run_folder.reader import read_run

Make = Callable[..., Settings]
RATES = "training.learning_rate=1e-3,5e-2"


class Rounds(SilentProgress):
    """Counts rounds and notes, and stops at a round as a kill does."""

    def __init__(self, last: int | None = None) -> None:
        self.rounds, self.notes, self.last = list[str](), list[str](), last

    def run_started(self, title: str, num_rounds: int, num_rounds_done: int = 0) -> None:
        self.title = title

    def round_done(self, record: Mapping[str, Any]) -> None:
        self.rounds.append(self.title)
        if len(self.rounds) == self.last:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def distinct_rows(tmp_path: Path) -> Path:
    """Write 60 rows of which no two are alike."""
    rows = [
        {"instruction": f"question {k}", "context": "", "response": f"answer {k}", "category": "abc"[k % 3]}
        for k in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_each_method_runs_with_the_point_of_its_lowest_validation_loss(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(federation__num_rounds=1)
    overrides = ["flora:training.local_steps=1"]
    found = compare(settings, ["fedit", "flora", "base"], [1, 2], tmp_path, overrides=overrides, grid=[RATES])
    assert found.tuning is not None
    for method in found.tuning.methods:
        losses = [read_run(tmp_path / point.folder).finished["eval"]["loss_nats"] for point in method.points]  # type: ignore[index]
        assert losses == [point.loss_nats for point in method.points]
        assert method.chosen == losses.index(min(losses))
        for seed in (1, 2):
            config = read_run(tmp_path / f"{method.method}-seed{seed}").config
            assert config["training"]["learning_rate"] == method.points[method.chosen].values["training.learning_rate"]
            assert config["training"]["local_steps"] == (1 if method.method == "flora" else 2)
            assert config["data"]["validation_fraction"] is None
    assert [one.method for one in found.tuning.methods] == ["fedit", "flora"]
    assert found.tuning.skipped == {"base": {"training.learning_rate": "it does not act"}}
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["tuning"] == found.tuning.as_dict()
    assert "the highest training.learning_rate of the grid" in written["tuning"]["methods"][0]["edges"]
    text = " ".join(" ".join(found.lines()).split())
    assert "No run is scored on" not in text
    assert "validation rows of seed 1: 10 % of the training rows that no run is scored on" in text
    assert written["warnings"][0].endswith("not at equal budget: flora 12, fedit 24")


def test_what_the_rows_say_that_runs_are_scored_on_changes_no_choice(
    settings_for: Make, distinct_rows: Path, tmp_path: Path
) -> None:
    from fedloom.assembly.inputs import Workshop

    settings, seeds = settings_for(data__path=str(distinct_rows), data__eval_rows=8, federation__num_rounds=1), (1, 2)
    found = compare(settings, ["fedit"], seeds, tmp_path / "out", grid=[RATES])
    workshop, rows = Workshop(), json.loads(distinct_rows.read_text())
    for seed in seeds:
        under = with_seed(settings, seed)
        scored = workshop.inputs(under, workshop.base(under)[0]).held_out_rows
        assert scored is not None
        for row in scored.rows:
            (asked,) = (one for one in rows if one["instruction"] == row["instruction"])
            asked["response"] = f"poison of {row['instruction']}"
    distinct_rows.write_text(json.dumps(rows))
    poisoned = compare(settings, ["fedit"], seeds, tmp_path / "poisoned", grid=[RATES])
    assert poisoned.tuning == found.tuning
    assert [one.eval for one in poisoned.runs] != [one.eval for one in found.runs]


@pytest.mark.parametrize("last", [1, 3, 4, 6])
def test_a_tuning_that_was_stopped_goes_on_where_it_was(last: int, settings_for: Make, tmp_path: Path) -> None:
    settings, how = settings_for(), {"grid": [RATES], "tune_seed": 7}
    whole = Rounds()
    once = compare(settings, ["fedit"], [1], tmp_path / "once", progress=whole, **how)
    stopped = Rounds(last)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, ["fedit"], [1], tmp_path / "again", progress=stopped, **how)
    resumed = Rounds()
    again = compare(settings, ["fedit"], [1], tmp_path / "again", progress=resumed, **how)
    assert stopped.rounds + resumed.rounds == whole.rounds == ["fedit, seed 7"] * 4 + ["fedit, seed 1"] * 2
    assert again.tuning == once.tuning
    assert [one.eval for one in again.runs] == [one.eval for one in once.runs]
    done = Rounds()
    assert compare(settings, ["fedit"], [1], tmp_path / "again", progress=done, **how).tuning == once.tuning
    assert done.rounds == []


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_choice(settings_for: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings_for(federation__num_rounds=4).as_dict()))
    command = [sys.executable, "-m", "fedloom", "compare", str(recipe), "--methods", "fedit,flora", "--grid", RATES]
    killed = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    second = tmp_path / "killed/tuning/fedit" / folder_name({"training.learning_rate": 5e-2}) / "rounds/2"
    while killed.poll() is None and not second.exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    for out in ("killed", "whole"):
        subprocess.run([*command, "--out", str(tmp_path / out)], check=True, capture_output=True)
    first, other = (json.loads((tmp_path / out / "tuning.json").read_text()) for out in ("killed", "whole"))
    assert first == other


@pytest.mark.slow
def test_tuning_runs_at_once_come_to_the_same_choice(settings_for: Make, tmp_path: Path) -> None:
    alone = compare(settings_for(), ["fedit", "flora"], [1], tmp_path / "alone", grid=[RATES])
    at_once = compare(settings_for(), ["fedit", "flora"], [1], tmp_path / "at-once", grid=[RATES], parallel=2)
    assert at_once.tuning == alone.tuning
    assert [one.eval for one in at_once.runs] == [one.eval for one in alone.runs]


def test_more_values_run_no_point_again_and_another_choice_is_refused_or_starts_over(
    settings_for: Make, tmp_path: Path
) -> None:
    settings = settings_for(federation__num_rounds=1)
    compare(settings, ["fedit"], [1], tmp_path, grid=["training.learning_rate=1e-3,1e-4"])
    more = Rounds()
    again = compare(settings, ["fedit"], [1], tmp_path, grid=["training.learning_rate=1e-5,1e-4,1e-3"], progress=more)
    assert len(more.rounds) == 1
    assert again.tuning is not None
    assert len(again.tuning.methods[0].points) == 3
    with pytest.raises(RunError, match=r"fedit-seed1: .*training\.learning_rate"):
        compare(settings, ["fedit"], [1], tmp_path, grid=[RATES])
    fresh = compare(settings, ["fedit"], [1], tmp_path, grid=[RATES], fresh=True)
    assert read_run(fresh.runs[0].folder).config["training"]["learning_rate"] == 5e-2


def test_a_point_that_does_not_train_is_not_chosen_and_without_another_that_is_said(
    settings_for: Make, tmp_path: Path
) -> None:
    settings, told = settings_for(federation__num_rounds=1), Rounds()
    found = compare(
        settings, ["fedit"], [1], tmp_path / "one", grid=["federation.max_norm_ratio=1e-9,100.0"], progress=told
    )
    assert found.tuning is not None
    (method,) = found.tuning.methods
    assert [point.loss_nats is None for point in method.points] == [True, False]
    assert method.points[0].reason == "a round had too few usable updates"
    assert method.chosen == 1
    assert any(note.startswith("not chosen: round 1: expected usable updates") for note in told.notes)
    with pytest.raises(RunError, match=r"tuning/fedit: expected a point of the grid that trains, got none"):
        compare(settings, ["fedit"], [1], tmp_path / "none", grid=["federation.max_norm_ratio=1e-9,1e-8"])


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"tune_seed": 2}, "--tune-seed: expected a --grid with several points, got none"),
        ({"validation": 0.2}, "--validation: expected a --grid with several points, got none"),
        ({"validation": 0.2, "grid": ["training.learning_rate=1"]}, "--validation: expected a --grid with several"),
        ({"validation": 1.5, "grid": [RATES]}, "--validation: expected a fraction above 0 and below 1, got 1.5"),
        ({"tune_seed": -2, "grid": [RATES]}, "--tune-seed: expected an integer ≥ 0, got -2"),
    ],
    ids=str,
)
def test_options_of_a_tuning_are_checked_before_anything_is_made(
    how: dict[str, Any], problem: str, settings_for: Make, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=problem):
        compare(settings_for(), ["fedit"], [1], tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_the_rows_that_settings_are_chosen_on_are_not_those_of_the_table(settings_for: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.validation_fraction: expected none beside --grid"):
        compare(settings_for(data__validation_fraction=0.2), ["fedit"], [1], tmp_path / "out", grid=[RATES])


def test_a_suites_missing_file_is_told_before_the_tuning(settings_for: Make, tmp_path: Path) -> None:
    (tmp_path / "refs.csv").write_text("not,the,columns\n")
    settings = settings_for(evaluation__suites=["e2e"], evaluation__paths={"e2e": str(tmp_path / "refs.csv")})
    with pytest.raises(Exception, match=r"refs\.csv"):
        compare(settings, ["fedit"], [1], tmp_path / "out", grid=[RATES])
    assert not (tmp_path / "out").exists()


def test_names_of_points_are_plain_and_differ() -> None:
    assert folder_name({"training.learning_rate": 0.001}) == "training.learning_rate=0.001"
    lists = [folder_name({"method.ranks": ranks}) for ranks in ((8, 4), (8, 2), {"a/b": 2}, "x" * 300)]
    assert len(set(lists)) == 4
    assert all("/" not in name and len(name) < 130 for name in lists)
