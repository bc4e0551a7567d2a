"""Runs in few bits, with steps of the server, shared moments or corrected steps: whole, resumed, and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom import config
from fedloom.config import Settings, with_method
from fedloom.experiment.session import run
from fedloom.preview.description import describe

Make = Callable[..., Settings]
FORMS: dict[str, dict[str, object]] = {
    "synchronised": {"method__name": "weave", "training__local_steps": 1},
    "short rounds": {"method__name": "weave", "training__moments": "shared"},
    "own moments": {"method__name": "zero-padding", "training__moments": "own", "wire__dtype": "int8"},
    "corrected steps": {"method__name": "fedit", "method__ranks": 4, "training__control_variates": True},
    "carry with momentum": {"method__name": "carry", "server__step": "momentum"},
    "flora in few bits": {
        "method__name": "flora",
        "wire__dtype": "int4",
        "method__broadcast": "compressed",
        "method__tolerance": 0.05,
    },
}


def kept(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(form: str, settings_for: Make, tmp_path: Path) -> None:
    """Clients' debts, what each holds and the optimisers' moments are in the files of a round."""
    drawn = {"federation__clients_per_round": 2, **FORMS[form]}
    run(settings_for(**drawn, federation__num_rounds=5), tmp_path / "whole")
    for num_rounds in (2, 3, 5):
        run(settings_for(**drawn, federation__num_rounds=num_rounds), tmp_path / "parts")
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")


@pytest.mark.parametrize("form", ["synchronised", "short rounds", "corrected steps", "carry with momentum"])
def test_what_is_described_is_what_crosses(form: str, settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(**{**FORMS[form], "federation__num_rounds": 3})
    run(settings, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    described = describe(settings)
    first, later = records[0]["clients"], records[-1]["clients"]
    assert [client["upload_bytes"] for client in later] == list(described.upload_bytes)
    assert [client["download_bytes"] for client in first] == list(described.first_download_bytes)
    for client, most in zip(later, described.download_bytes, strict=True):
        assert client["download_bytes"] <= most
    if form not in ("short rounds", "carry with momentum"):
        assert [client["download_bytes"] for client in later] == list(described.download_bytes)


def test_weave_in_four_bits_sends_an_eighth_of_fedits_bytes_a_message(settings_for: Make) -> None:
    settings = settings_for(method__name="fedit", method__ranks=4, training__local_steps=1)
    numbers = [describe(one).upload_bytes[0] for one in (settings, with_method(settings, "weave"))]
    header = 1 << 12
    assert numbers[1] - header < numbers[0] / 8 + numbers[0] / 16


def test_a_method_brings_its_own_defaults_and_keeps_what_was_named() -> None:
    recipe = {"method": {"name": "fedit"}, "training": {"local_steps": 1}, "data": {"path": "org/rows"}}
    weave = config.resolve(recipe, "a test", ["method.name=weave"], also=())
    assert (weave.wire.dtype, weave.method.weighting, weave.server.step) == ("int4", "work", "adamw")
    several = config.resolve(recipe, "a test", ["method.name=weave", "training.local_steps=5"], also=())
    assert (several.wire.dtype, several.server.step) == ("int4", "plain")
    named = config.resolve(recipe, "a test", ["method.name=weave", "wire.dtype=fp32"], also=())
    assert named.wire.dtype == "fp32"
    back = with_method(weave, "fedit")
    assert (back.wire.dtype, back.method.weighting, back.server.step) == ("fp32", "work", "plain")
    assert config.resolve(weave.as_dict(), "config.json", also=()) == weave
