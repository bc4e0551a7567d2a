"""One client's upload is changed on the wire: the run ends well, and its update is left out or bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fedloom.config import Settings
from fedloom.engines import receiving
from fedloom.experiment import run
from fedloom.federation.blob import sealed, unsealed

Make = Callable[..., Settings]
Mutate = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
HOSTILE = 1


def records_of(
    mutate: Mutate, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Run with client 1's tensors and numbers changed in place, or its whole message returned; give the rounds."""
    original = receiving.decode_answer

    def decode(blob: bytes, broadcast: Any, *rest: Any) -> Any:
        if broadcast.client == HOSTILE and (not rounds or broadcast.round in rounds):
            blob = unsealed(blob)
            length = int.from_bytes(blob[:8], "little")
            numbers = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["message"])
            tensors = load(blob)
            got = mutate(tensors, numbers)
            text = got if isinstance(got, str) else json.dumps(numbers)
            blob = save({key: t.contiguous() for key, t in tensors.items()}, metadata={"message": text})
            blob = sealed(got(blob) if callable(got) else blob)
        return original(blob, broadcast, *rest)

    monkeypatch.setattr(receiving, "decode_answer", decode)
    run(settings, folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def of_hostile(record: dict[str, Any]) -> dict[str, Any]:
    return dict(record["clients"][HOSTILE])


def number(name: str, value: Any) -> Mutate:
    return lambda tensors, numbers: numbers.update({name: value})


REFUSED: dict[str, Mutate] = {
    "update-extra-256-mb": lambda t, n: t.update({"evil.b": torch.zeros(2**24, 1, dtype=torch.uint8)}),
    "update-extra-number": number("admin", True),
    "update-garbled": lambda t, n: lambda blob: blob[:-100],
    "update-loss-text": number("loss_nats", "x"),
    "update-nested-numbers": lambda t, n: "[" * 100_000,
    "update-num-rows-text": number("num_rows", "20"),
    "update-num-rows-1e12": number("num_rows", 10**12),
    "one row more than registered": number("num_rows", 15),
    "more steps than asked for": number("num_steps", 3),
    "more tokens than so many rows can have": number("num_tokens", 10**6),
    "more targets than tokens": number("num_loss_tokens", 10**4),
    "update-num-rows-nan": number("num_rows", math.nan),
    "update-seconds-text": number("seconds", "<script>"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_message_that_does_not_fit_costs_its_client_the_round_and_nobody_else(
    case: str, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = records_of(REFUSED[case], settings_for(), tmp_path / "run", monkeypatch)
    assert len(records) == 2
    for record in records:
        reasons = [client["reason"] for client in record["clients"]]
        assert [reason is None for reason in reasons] == [True, False, True]
        assert all(math.isfinite(client["weight"]) for client in record["clients"])


def scaled(b: float, a: float) -> Mutate:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        for key, tensor in tensors.items():
            tensors[key] = tensor * (b if key.endswith(".b") else a)

    return change


@pytest.mark.parametrize("method", ["fedit", "flora", "zero-padding"])
@pytest.mark.parametrize("factors", [(1e6, 1e-6), (1e-6, 1e6), (1e15, 1.0), (1e4, 1e4)])
def test_absurd_factors_are_left_out_from_the_first_round_on(
    method: str, factors: tuple[float, float], settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(method__name=method, method__ranks=2)
    for record in records_of(scaled(*factors), settings, tmp_path / "run", monkeypatch):
        reasons = [client["reason"] for client in record["clients"]]
        assert [reason is None for reason in reasons] == [True, False, True]
        assert "federation.max_norm_ratio" in reasons[HOSTILE]


@pytest.mark.parametrize("rule", ["clip", "cosine", "median"])
@pytest.mark.parametrize("method", ["fedit", "flora", "ffa-lora"])
def test_a_rule_keeps_a_hostile_client_from_the_model_over_a_whole_run(
    rule: str, method: str, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three clients one sends its B 80 times as long the other way; the held-out loss stays near the honest one."""
    chosen = {"method__name": method, "method__ranks": 2, "server__robust": rule}
    chosen |= {"method__initialisation": "shared"} if method == "flora" else {}
    losses = []
    for factor in (1.0, -80.0):
        folder = tmp_path / f"{factor}"
        records = records_of(scaled(factor, 1.0), settings_for(**chosen), folder, monkeypatch)
        losses.append(records[-1]["eval"]["loss_nats"])
    assert abs(losses[1] - losses[0]) < 0.05


@pytest.mark.parametrize("rule", ["clip", "median"])
def test_a_rule_acts_on_a_cut_models_aggregation_too(rule: str, settings_for: Make, tmp_path: Path) -> None:
    split = {"method__name": "splitlora", "method__ranks": 2, "split__cut_layer": 1, "split__aggregate_every": 2}
    plain, ruled = (
        run(settings_for(**split, server__robust=one), tmp_path / one).eval["loss_nats"] for one in ("none", rule)
    )
    assert plain != ruled
    assert abs(plain - ruled) < 0.05
