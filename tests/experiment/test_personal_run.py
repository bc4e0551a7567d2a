"""A run whose clients keep a factor: one adapter per client, scored each for itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedloom.config import Settings
from fedloom.errors import SettingsError
from fedloom.experiment import describe, run
from fedloom.results.held_out import evaluate
from fedloom.results.opened_result import open_result

Make = Callable[..., Settings]


def factors(folder: Path, client: int, letter: str) -> dict[str, torch.Tensor]:
    found = load_file(folder / f"adapter/client-{client}/adapter_model.safetensors")
    return {key: tensor for key, tensor in found.items() if f"lora_{letter}" in key}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def of_method(make: Make, name: str, **overrides: object) -> Settings:
    return make(method__name=name, method__ranks=2, **overrides)


def test_every_client_has_an_adapter_of_its_own_b_over_the_one_a(settings_for: Make, tmp_path: Path) -> None:
    summary = run(of_method(settings_for, "fedsa-lora"), tmp_path / "run")
    a, b = ([factors(tmp_path / "run", client, letter) for client in range(3)] for letter in "AB")
    assert equal(a[0], a[1])
    assert equal(a[1], a[2])
    assert not equal(b[0], b[1])
    losses = summary.eval["loss_nats_of_client"]
    assert summary.eval["loss_nats"] == pytest.approx(sum(losses.values()) / 3)
    measured = evaluate(open_result(tmp_path / "run"))
    for client, loss in losses.items():
        assert measured.scores[f"client-{client}"].nats_per_token.value == pytest.approx(loss, rel=1e-4)
    assert not (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_a_client_that_has_not_taken_part_has_no_adapter_and_no_score(settings_for: Make, tmp_path: Path) -> None:
    settings = of_method(settings_for, "fedsa-lora", federation__clients_per_round=1, federation__num_rounds=1)
    summary = run(settings, tmp_path / "run")
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    (record,) = json.loads(line)["clients"]
    assert record["reason"] is None
    assert "loss_nats_of_client" not in summary.eval
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_with_one_client_it_is_fedit_to_the_bit(settings_for: Make, tmp_path: Path) -> None:
    for name in ("fedsa-lora", "fedit"):
        alone = {"federation__num_clients": 1, "partition__scheme": "iid", "partition__column": None}
        run(of_method(settings_for, name, **alone, federation__num_rounds=3), tmp_path / name)
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("fedsa-lora", "fedit")
    )
    assert [record["eval"]["loss_nats"] for record in ours] == [record["eval"]["loss_nats"] for record in theirs]
    assert [record["train_loss_nats"] for record in ours] == [record["train_loss_nats"] for record in theirs]


def test_only_a_crosses_and_described_bytes_are_those(settings_for: Make, tmp_path: Path) -> None:
    settings = of_method(settings_for, "fedsa-lora")
    described, summary = describe(settings), run(settings, tmp_path / "run")
    assert 2 * sum(described.upload_bytes) == summary.upload_bytes
    assert sum(described.first_download_bytes) + sum(described.download_bytes) == summary.download_bytes
    whole = run(of_method(settings_for, "fedit"), tmp_path / "fedit")
    assert summary.upload_bytes < 0.8 * whole.upload_bytes
    assert summary.download_bytes < whole.download_bytes


@pytest.mark.parametrize(
    ("name", "value"), [("server__step", "momentum"), ("server__learning_rate", 2.0), ("server__robust", "median")]
)
def test_what_acts_on_products_is_rejected(name: str, value: object, settings_for: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=name.replace("__", ".")):
        run(of_method(settings_for, "fedsa-lora", **{name: value}), tmp_path / "run")
