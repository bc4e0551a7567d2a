"""A run can be replayed with the clients whose updates counted in another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.assembly.participation import participation_of
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
