"""How many clients train together: what the settings say, else by the device and its free memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedloom.assembly import clients_at_once as module
from fedloom.assembly.clients_at_once import client_bytes, clients_at_once
from fedloom.assembly.free_memory import free_on
from fedloom.config import Settings
from fedloom.engines.local_engine import LocalEngine
from fedloom.experiment.session import run
from fedloom.preview.description import describe

Make = Callable[..., Settings]
SHAPES = {"q": (10, 6), "narrow": (10, 2)}
"""At rank 4: 4 · 16 and, since one side is 2, 2 · 12 numbers of 16 bytes each."""
EACH = 16 * (4 * 16 + 2 * 12)


def test_a_client_takes_sixteen_bytes_for_each_number_of_its_adapter() -> None:
    assert client_bytes(SHAPES, 4) == EACH


@pytest.mark.parametrize(
    ("device", "free_bytes", "expected"),
    [
        ("cpu", None, 1),
        ("mps", None, 1),
        ("cuda", None, 16),
        ("cuda", 4 * 16 * EACH, 16),
        ("cuda", 4 * 16 * EACH - 1, 15),
        ("cuda", 4 * 3 * EACH, 3),
        ("cuda", 0, 1),
        ("cuda", -1, 1),
    ],
)
def test_a_quarter_of_what_is_free_holds_the_adapters_of_all_that_are_open(
    settings_for: Make, device: str, free_bytes: int | None, expected: int
) -> None:
    settings = settings_for(method__ranks=[4, 2, 1])
    assert clients_at_once(settings, device, SHAPES, free_bytes) == expected


def test_what_the_settings_say_holds_whatever_is_free(settings_for: Make) -> None:
    settings = settings_for(method__ranks=[4, 2, 1], engine__clients_at_once=5)
    assert [clients_at_once(settings, device, SHAPES, 0) for device in ("cpu", "cuda")] == [5, 5]


def test_what_torch_reserved_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier run in the process leaves such memory behind; the next one is to choose what that one chose."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_on(torch.device("cuda")) == 140


def test_a_limit_by_memory_is_told(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    base = type("Base", (), {"parameters": lambda self: iter([type("Weight", (), {"device": cuda})])})()
    lora = type("Lora", (), {"model": base, "shapes": SHAPES})()
    monkeypatch.setattr(module, "free_on", lambda device: 4 * 2 * EACH)
    settings = settings_for(method__ranks=[4, 2, 1])
    assert module.clients_at_once_here(settings, lora) == (
        2,
        "2 clients at once instead of 16: each holds up to 1.41 kB, and 11.3 kB are free on cuda:0, of which a quarter "
        "is for them",
    )
    monkeypatch.setattr(module, "free_on", lambda device: 4 * 3 * EACH)
    assert module.clients_at_once_here(settings, lora) == (3, None), "three clients are all there are"


def test_clients_that_train_together_end_where_each_alone_does(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    made = LocalEngine.__post_init__

    def watched(self: LocalEngine) -> None:
        seen.append(self.clients_at_once)
        made(self)

    monkeypatch.setattr(LocalEngine, "__post_init__", watched)
    losses, recorded = [], []
    for number in (None, 3):
        settings = settings_for(federation__num_rounds=1, engine__clients_at_once=number)
        run(settings, tmp_path / str(number))
        lines = (tmp_path / str(number) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[-1])
        losses.append(record["train_loss_nats"])
        recorded.append(record["clients_at_once"])
    assert seen == recorded == [1, 3]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_describe_plans_what_trains_together(settings_for: Make) -> None:
    alone, together = (describe(settings_for(engine__clients_at_once=number)).memory for number in (1, 3))
    assert alone is not None
    assert together is not None
    assert (alone.clients_at_once, together.clients_at_once) == (1, 3)
    assert together.client_bytes == 3 * alone.client_bytes
