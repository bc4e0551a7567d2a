"""Runs on a device end as runs on a CPU do, within rounding: every method, and what goes beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.config import Settings
from fedloom.experiment import run
from fedloom.methods import table
from fedloom.results.held_out import evaluate
from fedloom.results.opened_result import open_result

Make = Callable[..., Settings]
RANKED: Mapping[str, Any] = {"method__ranks": 2, "training__dropout": 0.1}
BESIDE: Mapping[str, Mapping[str, Any]] = {
    "unequal ranks": {},
    "padded rows": {**RANKED, "model__attention": "padded"},
    "private rows": {**RANKED, "method__name": "fedit", "privacy__unit": "row", "privacy__noise_multiplier": 0.5},
    "control variates": {**RANKED, "method__name": "fedit", "training__control_variates": True},
    "few bits": {**RANKED, "method__name": "weave", "training__local_steps": 1, "wire__dtype": "int4"},
    "half precision": {**RANKED, "method__name": "fedit", "model__dtype": "bfloat16"},
    "a base in 4 bits": {**RANKED, "method__name": "fedit", "model__dtype": "bfloat16", "model__quantization": "4bit"},
}
NEEDS = {"a base in 4 bits": [pytest.mark.extra("quantized")]}


def losses(settings_for: Make, folder: Path, device: str, changes: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the base's loss, the run's own, and that of its result opened on the device."""
    settings = settings_for(**changes, model__device=device)
    summary = run(settings, folder / device)
    assert settings.model.device == device
    if not settings.traits.is_trained:
        return summary.base_eval["loss_nats"], summary.base_eval["loss_nats"], 0.0
    opened = evaluate(open_result(folder / device, device=device))
    return summary.base_eval["loss_nats"], summary.eval["loss_nats"], opened.mean_nats


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # bitsandbytes warns of layers so narrow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEEDS.get(name, [])) for name in [*table.shipped(), *BESIDE]]
)
def test_a_run_on_a_device_ends_as_on_the_cpu(name: str, settings_for: Make, tmp_path: Path) -> None:
    by_method = {} if name in BESIDE else {"method__name": name} | (RANKED if table.has(name, "is_trained") else {})
    changes = BESIDE.get(name, by_method)
    tolerance = 0.03 if changes.get("model__dtype") else 2e-3
    here, there = (losses(settings_for, tmp_path, device, changes) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, abs=tolerance)
    assert here[1] < here[0] or name == "base"
