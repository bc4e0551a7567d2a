"""The time of a run follows from its operations and from the cores that its steps keep busy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedloom.config import Settings
from fedloom.preview import planned_time as planned_time_module
from fedloom.preview.description import describe
from fedloom.preview.planned_time import PlannedTime
from fedloom.preview.row_sample import RowSample
from fedloom.split.cost_model import Work
from fedloom.training import cores

Make = Callable[..., Settings]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores, of a rate that is known."""
    monkeypatch.setattr(cores, "_usable", lambda: 4)
    monkeypatch.setattr(planned_time_module, "_rate", lambda settings, lora: 1e9)


def time_of(settings: Settings) -> PlannedTime:
    return describe(settings).time


def test_the_time_here_is_the_operations_at_the_rate_of_products(settings_for: Make) -> None:
    planned = time_of(settings_for())
    assert planned.flops is not None
    assert planned.here_seconds == pytest.approx(planned.flops / (1e9 * 0.4))
    assert "cores busy" not in planned.lines()[0]


@pytest.mark.parametrize(("chosen", "busy"), [(None, 2.4), (2, 4.8 / 3), (1, 1.0), (8, 4.8)])
def test_the_parts_of_a_step_keep_several_cores_busy(
    settings_for: Make, chosen: int | None, busy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five parts, the last of 80 tokens, take two turns on four cores, so that 2.4 are busy."""
    monkeypatch.setattr(cores, "PART_TOKENS", 100)
    monkeypatch.setattr(RowSample, "work", lambda sample, size: Work(480.0, 100.0, 100.0))
    planned = time_of(settings_for(**({} if chosen is None else {"engine__cores": chosen})))
    assert planned.flops is not None
    assert planned.here_seconds == pytest.approx(planned.flops / (1e9 * 0.4 * busy))
    assert (f"{busy:.3g} cores busy in a step" in planned.lines()[0]) == (busy > 1)


@pytest.mark.parametrize(("server_update", "busy"), [("joint", 9.6 / 3), ("sequential", 2.4)])
def test_a_cut_models_clients_share_a_joint_step(
    settings_for: Make, server_update: str, busy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "PART_TOKENS", 100)
    monkeypatch.setattr(RowSample, "work", lambda sample, size: Work(480.0, 100.0, 100.0))
    cut: dict[str, Any] = {"method__name": "splitlora", "method__ranks": 2, "federation__num_clients": 2}
    planned = time_of(settings_for(**cut, split__server_update=server_update))
    assert planned.flops is not None
    assert planned.here_seconds == pytest.approx(planned.flops / (1e9 * 0.4 * busy))
