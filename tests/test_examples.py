"""The flat examples do what the library does: the same aggregate on the same tensors, and a loss that falls."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fedloom import embedded
from fedloom.lora.algebra import truncate
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.fedex import FedEx
from fedloom.methods.fedsa import FedSALoRA
from fedloom.methods.ffa_lora import FFALoRA
from fedloom.methods.flexlora import FlexLoRA
from fedloom.methods.flora import FLoRA
from fedloom.methods.rolora import RoLoRA
from fedloom.methods.state import Update
from fedloom.methods.strategy import Cohort
from fedloom.methods.zero_padding import ZeroPadding, fedit
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

EXAMPLES = Path(__file__).parents[1] / "examples"
MODULE, SHAPE = "q", (6, 5)
A, B = f"{MODULE}.lora_A", f"{MODULE}.lora_B"
NUM_ROWS = [30, 10, 20]


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def factors(rank: int, client: int) -> tuple[Tensor, Tensor]:
    generator = torch_stream(1, "factors", client)
    draw = [
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((SHAPE[0], rank), (rank, SHAPE[1]))
    ]
    return draw[0], draw[1]


def updates(ranks: list[int]) -> list[Update]:
    adapters = [Adapter({MODULE: Pair(*factors(rank, client))}) for client, rank in enumerate(ranks)]
    return [Update(1, k, adapter, TrainingStats(NUM_ROWS[k], 1, 1, 1, 1.0, 1.0)) for k, adapter in enumerate(adapters)]


def named(ranks: list[int]) -> list[dict[str, Tensor]]:
    pairs = [factors(rank, client) for client, rank in enumerate(ranks)]
    return [{B: b, A: a} for b, a in pairs]


def cohort(ranks: list[int]) -> Cohort:
    return Cohort({MODULE: SHAPE}, max(ranks), ranks.__getitem__, seed=1)


def test_the_fedit_example_averages_as_the_library_does() -> None:
    ranks = [2, 2, 2]
    strategy = fedit(cohort(ranks))
    start = strategy.aggregate(strategy.initial(), updates(ranks)).start
    averaged = example("fedit").averaged(named(ranks), NUM_ROWS)
    assert start is not None
    torch.testing.assert_close(averaged[B], start[MODULE].b_OR)
    torch.testing.assert_close(averaged[A], start[MODULE].a_RI)


def test_the_zero_padding_example_averages_and_cuts_as_the_library_does() -> None:
    ranks, script = [3, 2, 1], example("zero_padding")
    strategy = ZeroPadding(cohort(ranks))
    start = strategy.aggregate(strategy.initial(), updates(ranks)).start
    averaged = script.averaged(named(ranks), NUM_ROWS, max(ranks))
    assert start is not None
    for rank in ranks:
        pair = truncate(start, rank)[MODULE]
        torch.testing.assert_close(script.cut(B, averaged[B], rank), pair.b_OR)
        torch.testing.assert_close(script.cut(A, averaged[A], rank), pair.a_RI)


def test_the_flora_example_stacks_to_the_library_s_product() -> None:
    ranks = [3, 2, 1]
    strategy = FLoRA(cohort(ranks))
    applied = strategy.aggregate(strategy.initial(), updates(ranks)).applied
    b, a = example("flora").stacked([factors(rank, client) for client, rank in enumerate(ranks)], NUM_ROWS)
    assert b.shape[1] == sum(ranks)
    torch.testing.assert_close(b @ a, applied[MODULE].delta())


def test_the_fedex_lora_example_adds_what_the_mean_misses_as_the_library_does() -> None:
    ranks, script = [2, 2, 2], example("fedex_lora")
    strategy = FedEx(cohort(ranks))
    aggregate = strategy.aggregate(strategy.initial(), updates(ranks))
    averaged = script.averaged(named(ranks), NUM_ROWS)
    assert aggregate.start is not None
    torch.testing.assert_close(averaged[B], aggregate.start[MODULE].b_OR)
    torch.testing.assert_close(averaged[A], aggregate.start[MODULE].a_RI)
    missed = script.missed(named(ranks), NUM_ROWS, averaged)[MODULE]
    torch.testing.assert_close(missed, aggregate.side[MODULE].delta())


def test_the_flexlora_example_decomposes_as_the_library_does() -> None:
    ranks, script = [3, 2, 1], example("flexlora")
    strategy = FlexLoRA(cohort(ranks))
    start = strategy.aggregate(strategy.initial(), updates(ranks)).start
    decomposed = script.decomposed(named(ranks), NUM_ROWS, max(ranks))
    assert start is not None
    for rank in ranks:  # a singular vector's sign is free, so products are compared
        b, a = (script.cut(name, decomposed[name], rank) for name in (B, A))
        torch.testing.assert_close(b @ a, truncate(start, rank)[MODULE].delta())


def test_the_ffa_lora_example_averages_b_as_the_library_does() -> None:
    ranks = [2, 2, 2]
    strategy = FFALoRA(cohort(ranks))
    start = strategy.aggregate(strategy.initial(), updates(ranks)).start
    uploads = [{B: upload[B]} for upload in named(ranks)]
    assert start is not None
    torch.testing.assert_close(example("ffa_lora").averaged(uploads, NUM_ROWS), {B: start[MODULE].b_OR})


@pytest.mark.parametrize("number", [1, 2])
def test_the_rolora_example_averages_by_turns_as_the_library_does(number: int) -> None:
    ranks, script = [2, 2, 2], example("rolora")
    strategy = RoLoRA(cohort(ranks))
    before = replace(strategy.initial(), round=number - 1)
    after = strategy.aggregate(before, updates(ranks)).start
    uploads = [
        {name: factor for name, factor in upload.items() if script.turn(number) in name} for upload in named(ranks)
    ]
    assert before.start is not None
    assert after is not None
    factors = {B: before.start[MODULE].b_OR, A: before.start[MODULE].a_RI} | script.averaged(uploads, NUM_ROWS)
    torch.testing.assert_close(factors, {B: after[MODULE].b_OR, A: after[MODULE].a_RI})


def test_the_fedsa_lora_example_averages_a_as_the_library_does() -> None:
    ranks = [2, 2, 2]
    strategy = FedSALoRA(cohort(ranks))
    start = strategy.aggregate(strategy.initial(), updates(ranks)).start
    uploads = [{A: upload[A]} for upload in named(ranks)]
    assert start is not None
    torch.testing.assert_close(example("fedsa_lora").averaged(uploads, NUM_ROWS), {A: start[MODULE].a_RI})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("fedit", "zero_padding", "flora", "fedex_lora", "flexlora", "ffa_lora", "rolora", "fedsa_lora"),
        *("centralised", "standalone"),
    ],
)
def test_an_example_runs_and_its_loss_falls(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = example(name)
    monkeypatch.setattr(script, "NUM_ROUNDS", 1)
    monkeypatch.setattr(script, "LOCAL_STEPS", 8)
    monkeypatch.setattr(script, "LEARNING_RATE", 1e-3)
    rows = tmp_path / "rows.jsonl"
    lines = embedded.data_path().read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(line for line in lines if '"towns"' in line), encoding="utf-8")
    losses = script.main(str(embedded.model_path()), str(rows))
    assert losses[-1] < losses[0]
    assert "held-out loss" in capsys.readouterr().out


def test_every_example_is_listed_with_its_method() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f"({script.name})" in listed
