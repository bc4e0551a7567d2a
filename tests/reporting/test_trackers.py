"""Trackers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.errors import MissingExtraError
from fedloom.reporting.trackers import (
    AllTrackers,
    MlflowTracker,
    TensorBoardTracker,
    WandbTracker,
    run_name_filter,
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
        tracker("project", "name", {})


def test_weights_and_biases_learns_which_way_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    run = SimpleNamespace(define_metric=lambda name, summary: told.update({name: summary}))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    WandbTracker("project", "name", {})
    assert told["eval/loss_nats"] == "min,last"
    assert told["eval/suites/e2e/metrics/BLEU/value"] == "max,last"
    assert dict(scalars({"eval": {"suites": {"e2e": {"metrics": {"BLEU": {"value": 0.5}}}}}})).keys() <= told.keys()


@pytest.mark.extra("wandb")
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    tracker = WandbTracker("project", "name", {"run": {"seed": 1}})
    tracker.log({"round": 1, "eval": {"loss_nats": 1.0}})
    tracker.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/run-name.wandb")
    assert log.stat().st_size > 0
    assert b"eval/loss_nats" in log.read_bytes()


@pytest.mark.extra("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_continues_a_resumed_run_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for n in (1, 2):
        tracker = MlflowTracker("project", "name", {"run": {"seed": 1}})
        tracker.log({"round": n, "eval": {"loss_nats": float(n)}})
        tracker.close()
    (run,) = mlflow.search_runs(experiment_names=["project"], output_format="list")
    assert run.data.params == {"run.seed": "1"}
    assert run.data.metrics["eval/loss_nats"] == 2.0


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


def test_a_quote_in_a_name_does_not_end_mlflows_filter() -> None:
    assert run_name_filter("plain, 100 %") == "attributes.run_name = 'plain, 100 %'"
    assert run_name_filter("""it's "a" \\ run""") == "attributes.run_name LIKE 'it_s _a_ _ run'"
