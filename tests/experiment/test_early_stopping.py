"""A run that stops early: when it does, what it keeps, and which round its adapter is of; the same if it is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedloom.config import Settings
from fedloom.errors import SettingsError
from fedloom.experiment import run
from fedloom.experiment.session import Session
from fedloom.results.opened_result import find_result
from fedloom.run_folder.best_round import best_round, is_over

Make = Callable[..., Settings]
LOSSES = [5.0, 3.0, 2.0, 2.5, 2.1, 1.0]
"""Of the base and after each round: with patience 2 round 4 is the last, and the best is round 2."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every state's loss read from the list above."""
    real = Session.evaluate

    def evaluate(self: Session, state: Any, score: Any) -> dict[str, Any]:
        return real(self, state, score) | {"loss_nats": LOSSES[state.round]}

    monkeypatch.setattr(Session, "evaluate", evaluate)


def patient(make: Make, **changes: Any) -> Settings:
    given = {"method__name": "fedit", "method__ranks": 2, "federation__num_rounds": 5}
    return make(**given | {"data__validation_fraction": 0.2, "evaluation__patience": 2} | changes)


def ends_of(folder: Path) -> tuple[int, int, float]:
    finished = json.loads((folder / "finished.json").read_text())
    return finished["round"], finished["released_round"], finished["eval"]["loss_nats"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


@pytest.mark.usefixtures("scripted")
def test_a_run_ends_where_patience_does_and_its_adapter_is_the_best_rounds(settings_for: Make, tmp_path: Path) -> None:
    summary = run(patient(settings_for), tmp_path / "run")
    assert ends_of(tmp_path / "run") == (4, 2, 2.0)
    assert (summary.num_rounds, summary.eval["loss_nats"]) == (4, 2.0)
    run(patient(settings_for, federation__num_rounds=2), tmp_path / "two")
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(tmp_path / "two"), rtol=0, atol=0)
    kept = sorted(int(state.parent.name) for state in (tmp_path / "run/rounds").glob("*/state"))
    assert kept == [2, 3, 4]
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    run(patient(settings_for, federation__num_rounds=9), tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("broken", ["_prune", "_write_adapter"])
def test_a_killed_run_stops_at_the_same_round(
    broken: str, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind its fourth round, at which it stops, before that is written down."""
    real = getattr(Session, broken)

    def killed(self: Session, *given: Any) -> Any:
        if self.folder.last_round() == 4:
            raise KeyboardInterrupt
        return real(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Session, broken, killed)
        with pytest.raises(KeyboardInterrupt):
            run(patient(settings_for), tmp_path / "run")
    run(patient(settings_for), tmp_path / "run")
    assert ends_of(tmp_path / "run") == (4, 2, 2.0)
    assert find_result(tmp_path / "run").adapters.keys() == {"result"}


def record(number: int, loss: float | None) -> dict[str, Any]:
    return {"round": number, "eval": None if loss is None else {"loss_nats": loss}}


def test_patience_counts_evaluations_and_not_rounds() -> None:
    losses = [3.0, None, 2.0, None, 2.5, None, 2.0]
    records = [record(number, loss) for number, loss in enumerate(losses, start=1)]
    assert best_round(records) == 3
    assert [is_over(records[:n], 2) for n in range(1, 8)] == [False] * 6 + [True]
    assert not is_over(records, None)
    assert not is_over(records, 3)


def test_a_loss_that_is_no_number_is_never_the_best_and_uses_patience_up() -> None:
    records = [record(1, 2.0), record(2, float("nan")), record(3, float("inf"))]
    assert best_round(records) == 1
    assert is_over(records, 2)
    assert best_round(records[1:]) is None


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({"data__validation_fraction": None}, "data.validation_fraction"), ({"evaluation__every": 0}, "evaluation.every")],
)
def test_patience_needs_rows_to_look_at_and_looks(changes: dict[str, Any], wanted: str, settings_for: Make) -> None:
    with pytest.raises(SettingsError, match=f"set {wanted}"):
        patient(settings_for, **changes)
