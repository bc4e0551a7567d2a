"""A state of the right syntax and the wrong shape is one line that names its round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.config import Settings
from fedloom.errors import RunError
from fedloom.experiment import run
from fedloom.run_folder.contents import HASHES, RoundFiles
from fedloom.run_folder.manifest import read_manifest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seen", "x"),
        ("seen", {"a": 1}),
        ("chain", "x"),
        ("chain", 10**12),
        ("typical_norm", "x"),
        ("round", "x"),
        ("seen", {"1": "x"}),
    ],
)
def test_a_state_whose_own_part_is_text_is_refused_by_its_round(
    name: str, value: Any, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    run(settings_for(federation__num_rounds=1), tmp_path / "run")
    path = tmp_path / "run/rounds/1/state/server.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    hashes = path.parents[1] / HASHES
    hashes.unlink()
    hashes.write_bytes(RoundFiles.listed(read_manifest(tmp_path / "run")["run"], 1, path.parents[1]))
    with pytest.raises(RunError, match="rounds/1: expected the state of a round"):
        run(settings_for(federation__num_rounds=2), tmp_path / "run")
