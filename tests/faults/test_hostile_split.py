"""One client's activations are changed on the wire of a cut model: it sits out, and the run ends well."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fedloom.config import Settings
from fedloom.errors import FedloomError
from fedloom.experiment import run
from fedloom.federation.blob import sealed, unsealed
from fedloom.methods.state import Failure
from fedloom.split.client_halves import LocalSplitClients
from fedloom.split.cut_messages import SplitMessage

Mutate = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
SPLIT = {"method__name": "splitlora", "method__ranks": 2, "split__cut_layer": 1, "split__aggregate_every": 2}


def longer(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
    lengths = tensors["lengths_N"].clone()
    lengths[0] += 100_000
    lengths[1] -= 100_000
    tensors["lengths_N"] = lengths


CASES: dict[str, Mutate] = {
    "split-lengths-negative": longer,
    "split-step-of-another": lambda t, f: f.update(step=77, kind="gradients", micro_batch=5),
    "split-targets-out-of-vocabulary": lambda t, f: t.update(targets_S=t["targets_S"] + 10**6),
    "split-tokens-1e12": lambda t, f: f.update(num_loss_tokens=10**12),
    "split-tokens-negative": lambda t, f: f.update(num_loss_tokens=-(10**6)),
}


@pytest.mark.parametrize("update", ["joint", "sequential"])
@pytest.mark.parametrize("case", CASES)
def test_a_changed_message_costs_its_client_the_period(
    case: str, update: str, settings_for: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LocalSplitClients.activations

    def activations(self: LocalSplitClients, step: int, micro_batch: int) -> Iterator[Any]:
        for message in original(self, step, micro_batch):
            if isinstance(message, Failure) or message.client != 1:
                yield message
                continue
            blob = unsealed(message.to_bytes())
            length = int.from_bytes(blob[:8], "little")
            fields, tensors = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["split"]), load(blob)
            CASES[case](tensors, fields)
            try:
                yield SplitMessage.from_bytes(sealed(save(tensors, metadata={"split": json.dumps(fields)})))
            except FedloomError as error:
                yield Failure(1, str(error))

    monkeypatch.setattr(LocalSplitClients, "activations", activations)
    run(settings_for(**SPLIT, split__server_update=update), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert [client["reason"] is None for client in record["clients"]] == [True, False, True]
