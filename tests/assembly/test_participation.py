"""A run can be replayed with the clients whose updates counted in another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom.assembly import participation
from fedloom.assembly.participation import departures_of, participation_of
from fedloom.config import Settings
from fedloom.errors import RunError, SettingsError
from fedloom.experiment.session import run


def test_a_replay_of_all_clients_is_the_run_itself(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    first = run(settings_for(federation__clients_per_round=2), tmp_path / "first")
    again = run(settings_for(federation__participation=str(first.folder)), tmp_path / "again")
    name = "adapter/adapter_model.safetensors"
    assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()
    rounds = [json.loads(line) for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    assert [len(record["clients"]) for record in rounds] == [2, 2]
    with pytest.raises(RunError, match="expected round 3 to replay"):
        participation_of(first.folder, 3)(3)
    with pytest.raises(RunError, match="expected a run of 1 clients"):
        participation_of(first.folder, 1)


def test_a_client_that_did_not_count_is_not_replayed(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    lines = [{"round": 1, "clients": [{"client": 0, "reason": "late"}, {"client": 2, "reason": None}]}]
    from fedloom.run_folder.writer import RunFolder

    with RunFolder.open(tmp_path / "run", {}, {}) as folder:
        folder.write_round(1, lines[0])
    assert participation_of(tmp_path / "run", 3)(1) == [2]


def test_a_folder_that_is_not_there_is_one_line(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"federation\.participation: expected the folder of a run"):
        settings_for(federation__participation=str(tmp_path / "none"))


CUT = {"method__name": "splitlora", "method__ranks": 2, "split__aggregate_every": 1, "federation__min_clients": 2}


def test_a_client_leaves_a_cut_model_where_it_left_the_run_that_is_replayed(
    settings_for: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings_for(**CUT), tmp_path / "whole")
    again = run(settings_for(**CUT, federation__participation=str(whole.folder)), tmp_path / "again")
    name = "adapter/adapter_model.safetensors"
    assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes()
    recorded = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    moment = recorded[0]["clients"][1]["left_at"] = {"step": 0, "micro_batch": 0, "stage": "finish"}
    monkeypatch.setattr(participation, "read_run", lambda path: SimpleNamespace(records=recorded))
    left = run(settings_for(**CUT, federation__participation=str(whole.folder)), tmp_path / "left")
    records = [json.loads(line) for line in (left.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["clients"][1]["reason"] == "left at step 0, as in the run that is replayed"
    assert records[0]["clients"][1]["left_at"] == moment
    assert [client["reason"] for client in records[0]["clients"]][::2] == [None, None]
    assert (whole.folder / name).read_bytes() != (left.folder / name).read_bytes()


def test_a_run_that_cannot_be_replayed_with_a_cut_model_is_one_line(tmp_path: Path) -> None:
    from fedloom.run_folder.writer import RunFolder

    moment = {"step": 0, "micro_batch": 0, "stage": "loss"}
    for name, entry in (("cut", {"left_at": moment}), ("rounds", {})):
        with RunFolder.open(tmp_path / name, {}, {}) as folder:
            folder.write_round(1, {"round": 1, "clients": [{"client": 0, "reason": None, **entry}]})
    with pytest.raises(RunError, match="client 0 spoilt a step"):
        departures_of(tmp_path / "cut")(1)
    with pytest.raises(RunError, match="expected round 2 to replay"):
        departures_of(tmp_path / "cut")(2)
    with pytest.raises(RunError, match="expected a run of a cut model"):
        departures_of(tmp_path / "rounds")
