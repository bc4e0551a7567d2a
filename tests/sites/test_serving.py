"""A study over sites comes to what one process with the same rows comes to, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memory_link import NAMES, Hub, SiteThread, adapter_of, served, study_of

from fedloom.config import Settings
from fedloom.experiment.session import run
from fedloom.federation.blob import WireDtype
from fedloom.federation.server import addressed
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import Broadcast, News, ServerState
from fedloom.reporting.report import write_report

METHODS = [
    ({"method__name": "flora"}, "fp32"),
    ({"method__name": "fedit", "method__ranks": 4, "training__control_variates": True}, "fp32"),
    ({"method__name": "rolora", "method__ranks": 4}, "bf16"),
    ({"method__name": "ffa-lora", "federation__clients_per_round": 2}, "fp32"),
    ({"method__name": "flora", "federation__clients_per_round": 2, "federation__num_rounds": 5}, "bf16"),
    (
        {
            "method__name": "weave",
            "training__moments": "shared",
            "training__control_variates": True,
            "federation__clients_per_round": 2,
        },
        "int4",
    ),
    ({"method__name": "weave", "method__initialisation": "gradient", "federation__clients_per_round": 2}, "int4"),
    ({"method__name": "ffa-lora", "method__initialisation": "gradient", "training__schedule_span": "run"}, "bf16"),
    ({"method__name": "fedit", "method__ranks": 4, "server__step": "adamw", "training__local_steps": 1}, "int2"),
]


@pytest.mark.parametrize(("changes", "dtype"), METHODS)
def test_sites_give_the_adapter_of_one_process(
    changes: dict[str, object],
    dtype: str,
    recipe: Callable[..., Settings],
    sites: Callable[..., list[SiteThread]],
    tmp_path: Path,
) -> None:
    settings, hub = recipe(**changes, wire__dtype=dtype), Hub()
    alone = run(settings, tmp_path / "alone")
    sites(hub)
    summary = served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(tmp_path / "alone")
    assert summary.eval == alone.eval
    records = [json.loads(line) for line in (tmp_path / "served" / "metrics.jsonl").read_text().splitlines()]
    assert [site["name"] for site in records[-1]["sites"]] == NAMES
    assert all(client["reason"] is None for record in records for client in record["clients"])


def test_the_report_says_who_was_left_out_of_which_round_and_why(
    recipe: Callable[..., Settings], sites: Callable[..., list[SiteThread]], tmp_path: Path
) -> None:
    hub = Hub()
    sites(hub, max_rank=2)
    served(study_of(recipe(federation__num_rounds=1), NAMES, quorum=2, grace_s=5.0), tmp_path / "served", hub)
    write_report([tmp_path / "served"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "left out of" in page
    assert "round 1: its policy (policy.max_rank) allows ranks up to 2, the study asks for 4" in page


def test_a_client_that_asks_for_the_whole_side_gets_it_though_additions_would_do() -> None:
    strategy: Any = SimpleNamespace(origin=None)
    side = Adapter({"layer": Pair(torch.ones(4, 1), torch.ones(1, 4))})
    state = ServerState(round=1, side=side, chain=(side,))
    broadcast = Broadcast(2, 0, 1, 1.0, News(1, 1, (), False, "sha"), Draw(("a",), 1))
    whole, news, nothing = (addressed(broadcast, state, strategy, held, WireDtype.FP32).news for held in (None, 0, 1))
    assert (whole.is_whole, whole.parts) == (True, (side,))
    assert (news.is_whole, news.since, nothing.parts) == (False, 0, ())
