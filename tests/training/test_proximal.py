"""FedProx on the product: its gradient is autograd's on the dense product, and a client ends nearer to its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.data.tokens import TokenSet
from fedloom.lora.algebra import distance
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.pair import Adapter, Pair
from fedloom.seeding import torch_stream
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.proximal import pull_to_start

SHAPES, RANK, SCALE, WEIGHT = {"q": (7, 5), "v": (4, 6)}, 3, 1.5, 0.7
SETTINGS = LocalTraining(learning_rate=1e-2, batch_size=3, steps=4)


def slot(seed: int) -> dict[str, nn.Parameter]:
    """Return raw factors whose gradients are ones, so that an addition shows."""
    made = {}
    for name, (num_out, num_in) in SHAPES.items():
        for factor, width in (("a_RI", num_in), ("bt_RO", num_out)):
            draw = torch_stream(seed, name, factor)
            made[f"{name}.{factor}"] = nn.Parameter(torch.randn(RANK, width, generator=draw, dtype=torch.float64))
    for parameter in made.values():
        parameter.grad = torch.ones_like(parameter)
    return made


def products(factors: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: SCALE * factors[f"{name}.bt_RO"].T @ factors[f"{name}.a_RI"] for name in SHAPES}


def moved(factors: dict[str, nn.Parameter], seed: int) -> None:
    with torch.no_grad():
        for name, other in slot(seed).items():
            factors[name].add_(0.3 * other)


def test_the_gradient_is_that_of_the_dense_squared_distance() -> None:
    factors = slot(1)
    pull = pull_to_start(WEIGHT, factors, SCALE, factors)
    start = {name: product.detach() for name, product in products(factors).items()}
    moved(factors, 2)
    penalty = sum((WEIGHT / 2 * (p - start[n]).square().sum() for n, p in products(factors).items()), torch.zeros(()))
    dense = torch.autograd.grad(penalty, list(factors.values()))
    pull()
    for factor, expected in zip(factors.values(), dense, strict=True):
        torch.testing.assert_close(factor.grad, 1.0 + expected, rtol=1e-12, atol=1e-12)


def test_at_the_start_nothing_pulls_and_a_factor_at_rest_is_not_pulled() -> None:
    factors = slot(1)
    pull = pull_to_start(WEIGHT, factors, SCALE, [name for name in factors if name.endswith("bt_RO")])
    pull()
    assert all(torch.equal(factor.grad, torch.ones_like(factor)) for factor in factors.values())  # type: ignore[arg-type]
    moved(factors, 2)
    pull()
    for name, factor in factors.items():
        assert torch.equal(factor.grad, torch.ones_like(factor)) is name.endswith("a_RI")  # type: ignore[arg-type]


def test_a_weight_of_zero_touches_nothing() -> None:
    pull_to_start(0.0, {"q.a_RI": nn.Parameter(torch.ones(1, 1))}, SCALE, ())()


def test_the_pull_on_the_product_does_not_depend_on_how_it_is_factored() -> None:
    """A step of SGD on both factors moves the product alike under a rotation of the slots."""
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch_stream(3, "turn"), dtype=torch.float64)).Q
    results = []
    for rotation in (torch.eye(RANK, dtype=torch.float64), turn):
        factors = slot(1)
        with torch.no_grad():
            for factor in factors.values():
                factor.copy_(rotation @ factor)
        pull = pull_to_start(WEIGHT, factors, SCALE, factors)
        with torch.no_grad():
            for name, other in slot(2).items():
                factors[name].add_(rotation @ other.detach())
                factors[name].grad.zero_()  # type: ignore[union-attr]
        pull()
        with torch.no_grad():
            for factor in factors.values():
                factor.sub_(0.1 * factor.grad)  # type: ignore[operator]
        results.append(products(factors))
    for name in SHAPES:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-12, atol=1e-12)


@pytest.fixture
def task(llama_lora: LoRAModel, rows_of_lengths: Callable[..., TokenSet]) -> ClientTask:
    """Return a client of three rows, each batch all of them, that starts away from zero."""
    fresh, draw = fresh_adapter(llama_lora.shapes, 2, 0, 1).to(torch.float64), torch_stream(5, "b")
    start = Adapter(
        {
            name: Pair(0.1 * torch.randn(pair.b_OR.shape, generator=draw, dtype=torch.float64), pair.a_RI)
            for name, pair in fresh.items()
        }
    )
    return ClientTask(1, rows_of_lengths([21, 2, 6], 1), 2, 2.0, start)


def test_rounds_with_it_equal_a_plain_loop_with_the_dense_penalty(llama_lora: LoRAModel, task: ClientTask) -> None:
    (result,) = train_cohort(llama_lora, [task], replace(SETTINGS, proximal=5.0), seed=1, round=1)
    lora = llama_lora
    lora.open([Slot(task.rank, task.scale)])
    lora.load(0, task.start)
    lora.route_all(0)
    parameters = lora.parameters(0)
    optimiser = torch.optim.AdamW(parameters, lr=SETTINGS.learning_rate, weight_decay=0.0)
    before = {name: pair.delta().double() for name, pair in task.start.items()}
    for _ in range(4):
        lora.zero_grad()
        torch.cat([own_losses(lora.model, task.rows, i) for i in range(len(task.rows))]).mean().backward()
        whole = dict(zip(before, zip(parameters[::2], parameters[1::2], strict=True), strict=True))
        penalty = sum(
            (2.5 * (task.scale * bt.T @ a - before[n]).square().sum() for n, (a, bt) in whole.items()), torch.zeros(())
        )
        penalty.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    for name, pair in lora.adapter(0).items():
        torch.testing.assert_close(result.adapter[name].a_RI, pair.a_RI, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(result.adapter[name].b_OR, pair.b_OR, rtol=1e-8, atol=1e-8)


def test_the_larger_its_weight_the_nearer_a_client_stays_to_its_start(llama_lora: LoRAModel, task: ClientTask) -> None:
    ended = [
        train_cohort(llama_lora, [task], replace(SETTINGS, steps=20, proximal=weight), seed=1, round=1)[0].adapter
        for weight in (0.0, 1.0, 100.0)
    ]
    apart = [distance(adapter, task.start) for adapter in ended]
    assert apart[0] > 1.1 * apart[1] > 1.2 * apart[2]


def own_losses(model: Any, rows: TokenSet, index: int) -> torch.Tensor:
    ids, supervised = (torch.from_numpy(part.copy()) for part in rows.row(index))
    logits_TV = model(input_ids=ids.long()[None], use_cache=False).logits[0]
    nats = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:].long(), reduction="none")
    return nats[supervised[1:]]
