"""Peaks of memory, of the process and of a CUDA device that stands in for a real one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedloom.config import Settings
from fedloom.experiment import compare, run
from fedloom.reporting.metrics import DEVICE_PEAK
from fedloom.reporting.peak_memory import peak_memory_bytes, peaks_of_round, reset_device_peak
from fedloom.reporting.report import write_report
from fedloom.run_folder.reader import read_run

Make = Callable[..., Settings]


class Device:
    """The peaks of two CUDA devices, of which the second holds more."""

    def __init__(self) -> None:
        self.peaks = [0, 0]
        self.num_resets = 0

    def hold(self, num_bytes: int) -> None:
        self.peaks = [max(self.peaks[0], num_bytes // 2), max(self.peaks[1], num_bytes)]

    def reset(self, device: int) -> None:
        self.peaks[device] = 0
        self.num_resets += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Return a device that ``fedloom.reporting.peak_memory`` takes for CUDA's; nothing else sees it."""
    found = Device()
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        max_memory_allocated=lambda device: found.peaks[device],
        reset_peak_memory_stats=found.reset,
    )
    seen = SimpleNamespace(modules={"torch": SimpleNamespace(cuda=cuda)}, platform=sys.platform)
    monkeypatch.setattr("fedloom.reporting.peak_memory.sys", seen)
    return found


def test_peak_memory_is_that_of_this_process() -> None:
    assert 10_000_000 < peak_memory_bytes() < 1e12
    assert peaks_of_round()["peak_memory_bytes"] == pytest.approx(peak_memory_bytes(), rel=0.1)


def test_a_round_s_device_peak_is_its_own(device: Device) -> None:
    device.hold(500)
    reset_device_peak()
    device.hold(20)
    assert peaks_of_round()["peak_device_memory_bytes"] == 20
    device.hold(10)
    assert peaks_of_round()["peak_device_memory_bytes"] == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_its_peak_is_unknown() -> None:
    assert peaks_of_round()["peak_device_memory_bytes"] is None


def test_a_device_that_nobody_used_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert peaks_of_round()["peak_device_memory_bytes"] is None


@pytest.mark.parametrize(
    "method",
    [
        {"method__name": "fedit", "method__ranks": 2},
        {"method__name": "splitlora", "method__ranks": 2, "split__cut_layer": 1, "split__aggregate_every": 2},
    ],
    ids=lambda method: method["method__name"],
)
def test_every_round_s_device_peak_stands_in_its_record_the_summary_and_the_report(
    method: dict[str, object], settings_for: Make, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter((9_000_000, 3_000_000, 2_000_000))  # the base's evaluation, then two rounds
    evaluation = {"loss_nats": 1.0, "num_rows": 6, "num_loss_tokens": 60}
    evaluate = "fedloom.experiment.session.evaluate_state"
    monkeypatch.setattr(evaluate, lambda *_: device.hold(next(held)) or dict(evaluation))
    summary = run(settings_for(**method), tmp_path / "out" / "run")
    records = read_run(tmp_path / "out" / "run").records
    assert [record["peak_device_memory_bytes"] for record in records] == [3_000_000, 2_000_000]
    assert summary.peak_device_memory_bytes == 3_000_000
    assert summary.lines()[-2 if summary.aggregation_noise is not None else -1].endswith(
        "of the device 3 MB in one round"
    )
    write_report([tmp_path / "out"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count(DEVICE_PEAK.title) == 2  # a tile, and a column


def test_without_a_device_neither_summary_nor_table_has_its_peak(settings_for: Make, tmp_path: Path) -> None:
    found = compare(settings_for(federation__num_rounds=1), ["fedit"], [1], tmp_path / "out")
    assert found.runs[0].peak_device_memory_bytes is None
    assert not [line for line in found.runs[0].lines() if "device" in line]
    assert DEVICE_PEAK not in found.table.metrics
