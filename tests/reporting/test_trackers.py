"""Trackers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.errors import MissingExtraError
from fedloom.reporting.trackers import (
    AllTrackers,
    MlflowTracker,
    TensorBoardTracker,
    TrackedRun,
    WandbTracker,
    client_series,
    scalars,
)

RECORD = {
    "round": 1,
    "eval": {"loss_nats": 2.0, "note": "x"},
    "clients": [{"client": 1}],
    "upload_bytes": 5,
    "ok": True,
}


def test_numbers_of_a_record_are_named_by_their_path() -> None:
    assert dict(scalars(RECORD)) == {"round": 1.0, "eval/loss_nats": 2.0, "upload_bytes": 5.0}


def test_tensorboard_reads_back_what_was_logged_and_a_resumed_run_hides_what_it_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    first = TensorBoardTracker(tmp_path)
    for n in (1, 2, 3):
        first.log({"round": n, "eval": {"loss_nats": float(n)}})
    first.close()
    resumed = TensorBoardTracker(tmp_path, num_rounds_done=2)
    resumed.log({"round": 3, "eval": {"loss_nats": 30.0}})
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/loss_nats")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize(("tracker", "extra"), [(WandbTracker, "wandb"), (MlflowTracker, "mlflow")])
def test_a_tracker_that_is_not_installed_names_its_extra(
    tracker: type[WandbTracker | MlflowTracker], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'fedloom\[{extra}\]'"):
        tracker(tracked())


def tracked(run: str = "a" * 32, folder: Path = Path("runs/fedit-seed1"), **changes: Any) -> TrackedRun:
    return TrackedRun(run, folder.name, folder, {"run": {"seed": 1}}, **changes)


def wandb_asked(monkeypatch: pytest.MonkeyPatch, *runs: TrackedRun) -> list[dict[str, Any]]:
    """Return what Weights & Biases is asked for by each run."""
    asked: list[dict[str, Any]] = []
    run = SimpleNamespace(define_metric=lambda name, summary: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: asked.append(given) or run))
    for one in runs:
        WandbTracker(one)
    return asked


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_TAGS", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_weights_and_biases_learns_which_way_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    run = SimpleNamespace(define_metric=lambda name, summary: told.update({name: summary}))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    WandbTracker(tracked())
    assert told["eval/loss_nats"] == "min,last"
    assert told["eval/suites/e2e/metrics/BLEU/value"] == "max,last"
    assert dict(scalars({"eval": {"suites": {"e2e": {"metrics": {"BLEU": {"value": 0.5}}}}}})).keys() <= told.keys()


def test_runs_of_one_name_in_two_comparisons_are_two_runs_of_two_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = tmp_path / "slow/compared", tmp_path / "fast/compared"
    one, two, other = wandb_asked(
        monkeypatch,
        tracked("a", slow / "fedit-seed1"),
        tracked("b", fast / "fedit-seed1"),
        tracked("c", slow / "flora-seed1"),
    )
    assert (one["name"], two["name"]) == ("fedit-seed1", "fedit-seed1")
    assert (one["id"], two["id"], other["id"]) == ("a", "b", "c")
    assert one["group"] == other["group"] != two["group"]
    assert one["group"].startswith("compared-")
    assert str(tmp_path) not in str([one, two])


def test_settings_go_before_the_environment_and_the_environment_before_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = tracked(project="lab", group="ablation", tags=("x",))
    (plain,) = wandb_asked(monkeypatch, tracked())
    assert (plain["project"], plain["tags"]) == ("fedloom", None)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep")
    given, settings = wandb_asked(monkeypatch, tracked(), said)
    assert (given["project"], given["group"]) == ("theirs", "sweep")
    assert (settings["project"], settings["group"], settings["tags"]) == ("lab", "ablation", ("x",))


def test_clients_have_series_of_their_own_under_names_that_no_two_share() -> None:
    entries = [
        {"client": 0, "name": "0", "loss_nats": 2.0, "norm": 0.5},
        {"client": 1, "name": "north/a", "loss_nats": None, "norm": 1.5},
        {"client": 100, "name": "100", "loss_nats": 3.0},
    ]
    assert dict(client_series({"round": 1, "clients": entries})) == {
        "clients/0/loss_nats": 2.0,
        "clients/0/norm": 0.5,
        "clients/1-north_a/norm": 1.5,
    }


@pytest.mark.extra("wandb")
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    for run in ("one", "two"):
        tracker = WandbTracker(tracked(run))
        tracker.log({"round": 1, "eval": {"loss_nats": 1.0}, "clients": [{"client": 2, "name": "2", "norm": 1.0}]})
        tracker.close()
    for run in ("one", "two"):
        (log,) = tmp_path.glob(f"wandb/offline-run-*/run-{run}.wandb")
        for _ in range(200):  # its service writes the file in a process of its own, up to 0.1 s after the run's end
            if b"clients/2/norm" in log.read_bytes():
                break
            sleep(0.05)
        assert b"eval/loss_nats" in log.read_bytes()
        assert b"clients/2/norm" in log.read_bytes()


@pytest.mark.extra("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_continues_a_resumed_run_and_begins_another_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    told = {"clients": [{"client": 0, "name": 'it\'s "here" ?', "norm": 1.0}]}
    for run, n in (("one", 1), ("one", 2), ("two", 1)):
        tracker = MlflowTracker(tracked(run, tmp_path / run / "fedit-seed1", project="project", tags=("first",)))
        tracker.log({"round": n, "eval": {"loss_nats": float(n)}, **told})
        tracker.close()
    runs = {run.data.tags["fedloom.run"]: run for run in mlflow.search_runs(["1"], output_format="list")}
    assert runs.keys() == {"one", "two"}
    assert runs["one"].data.params == {"run.seed": "1"}
    assert runs["one"].data.metrics["eval/loss_nats"] == 2.0
    assert runs["one"].data.metrics["clients/0-it_s _here_ _/norm"] == 1.0
    assert runs["one"].data.tags["fedloom.group"] != runs["two"].data.tags["fedloom.group"]
    assert runs["one"].data.tags["first"] == "true"


def test_every_tracker_receives_every_record() -> None:
    class Listed:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def log(self, record: Mapping[str, Any]) -> None:
            self.seen.append(record)

        def close(self) -> None:
            self.seen.append("closed")

    trackers = [Listed(), Listed()]
    both = AllTrackers(trackers)
    both.log(RECORD)
    both.close()
    assert [tracker.seen for tracker in trackers] == [[RECORD, "closed"]] * 2
