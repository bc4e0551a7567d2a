"""A split run from settings: trains, resumes to the bit, leaves one adapter, and is compared at equal rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.assembly.split_run import split_plan
from fedloom.config import Settings
from fedloom.errors import FedloomError
from fedloom.experiment import compare, describe, run

Make = Callable[..., Settings]
SPLIT = {"method__name": "splitlora", "method__ranks": 2, "split__cut_layer": 1, "split__aggregate_every": 2}


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("choice", [{}, {"split__client_half": "frozen"}])
def test_a_split_run_learns_and_counts_activations_and_adapters_apart(
    choice: dict[str, object], settings_for: Make, tmp_path: Path
) -> None:
    summary = run(settings_for(**{**SPLIT, **choice}, training__local_steps=6), tmp_path / "run")
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    kinds = record["bytes_by_kind"]
    assert record["upload_bytes"] == kinds["activations"]["upload_bytes"] + kinds["adapters"]["upload_bytes"]
    assert (kinds["adapters"]["upload_bytes"] > 0) is (not choice)


def test_a_split_run_goes_on_to_the_same_bits(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(**SPLIT, federation__num_rounds=3), tmp_path / "whole")
    for rounds in (1, 3):
        run(settings_for(**SPLIT, federation__num_rounds=rounds), tmp_path / "parts")
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "parts")


def test_split_and_federated_runs_take_equal_steps_and_stand_in_one_table(settings_for: Make, tmp_path: Path) -> None:
    result = compare(settings_for(**SPLIT), ["splitlora", "fedit", "centralised"], [1], tmp_path)
    assert set(result.table.cells) == {"splitlora", "fedit", "centralised"}
    assert split_plan(settings_for(**SPLIT), [14, 14, 14]).num_steps == 4


@pytest.mark.parametrize("cut_layer", [2, 7])
def test_a_cut_beyond_the_last_block_is_refused_with_what_is_allowed(
    cut_layer: int, settings_for: Make, tmp_path: Path
) -> None:
    with pytest.raises(FedloomError, match=r"cut_layer.*1"):
        run(settings_for(**SPLIT | {"split__cut_layer": cut_layer}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_described_cuts_are_every_cut_of_the_base(settings_for: Make) -> None:
    cuts = describe(settings_for(**SPLIT)).as_dict()["cuts"]
    assert [cut["cut_layer"] for cut in cuts["cuts"]] == [1]
    assert cuts["cuts"][0]["upload_bytes_per_step"] > 0
    assert set(cuts["simulated_seconds"]) == {"splitlora", "fedit", "centralised"}


def test_the_described_bytes_of_a_whole_split_run_are_near_those_that_cross(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(**SPLIT)
    cuts, summary = describe(settings).as_dict()["cuts"], run(settings, tmp_path)
    # The estimate leaves out headers, a sixth of these small messages.
    assert 0.75 * summary.upload_bytes < cuts["upload_bytes"] < summary.upload_bytes
    assert 0.75 * summary.download_bytes < cuts["download_bytes"] < summary.download_bytes
