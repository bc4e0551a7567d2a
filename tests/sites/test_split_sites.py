"""A cut model over sites comes to what one process comes to, bit for bit; nothing that a side sends is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_link import NAMES, Hub, SiteThread, served, study_of

from fedloom.config import Settings
from fedloom.experiment.session import run
from fedloom.sites import remote_split_clients, sites_engine

StartSites = Callable[..., list[SiteThread]]
SPLIT: dict[str, Any] = {
    "method__name": "splitlora",
    "method__ranks": 2,
    "federation__num_rounds": 3,
    "split__aggregate_every": 2,
}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites_engine, "ASK_AGAIN_SECONDS", 0.5)


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels stay": {"split__labels": "client", "wire__dtype": "bf16"},
    "different cuts and ranks": {
        "split__cut_layer": [1, 2, 2],
        "method__ranks": [4, 2, 1],
        "split__aggregation": "flora",
        "wire__dtype": "bf16",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_model_over_sites_gives_the_adapter_of_one_process(
    case: str, recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    settings, hub = recipe(**SPLIT | CASES[case]), Hub()
    alone = run(settings, tmp_path / "alone")
    sites(hub, split="yes")
    summary = served(study_of(settings, NAMES, quorum=3, deadline_s=20.0), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)
    assert summary.eval == alone.eval
    assert all(client["reason"] is None for record in records_of(tmp_path / "served") for client in record["clients"])
