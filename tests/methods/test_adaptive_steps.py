"""FedAdagrad, FedAdam and FedYogi on the product: each equals a small dense implementation, round after round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedloom.config import Settings
from fedloom.experiment import run
from fedloom.lora.algebra import distance, norm
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.adaptive_steps import Adaptive, AdaptiveStep, mean_squares
from fedloom.methods.state import ServerState, StepMemory
from fedloom.methods.state_codec import NUMBERS, TENSORS, read_state, state_files
from fedloom.seeding import torch_stream

SHAPES, RANK = {"q": (9, 7), "v": (5, 8)}, 2


def change(round: int, dtype: torch.dtype = torch.float64) -> Adapter:
    """Return a round's change; some rows and columns change much more than others."""
    pairs = {}
    for name, (num_out, num_in) in SHAPES.items():
        draw = torch_stream(round, "change", name)
        b = torch.randn(num_out, RANK, generator=draw, dtype=torch.float64) * torch.logspace(-3, 0, num_out)[:, None]
        a = torch.randn(RANK, num_in, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, num_in)
        pairs[name] = Pair(0.01 * b, a)
    return Adapter(pairs).to(dtype)


class Dense:
    """The rule of the module's docstring on dense matrices."""

    def __init__(self, step: AdaptiveStep) -> None:
        self.step, self.unit = step, 0.0
        self.v: dict[str, list[Tensor]] = {}
        self.m = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def move(self, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        step = self.step
        if not self.unit:
            self.unit = float(torch.cat([d.flatten() for d in changed.values()]).square().mean())
            floor = step.epsilon**2 * self.unit
            self.v = {
                n: [torch.full((size,), floor, dtype=torch.float64) for size in shape] for n, shape in SHAPES.items()
            }
        moved = {}
        for name, d in changed.items():
            squares = d.square() + step.epsilon**2 * self.unit
            self.v[name] = [
                self.gathered(v, u) for v, u in zip(self.v[name], (squares.mean(1), squares.mean(0)), strict=True)
            ]
            self.m[name] = step.beta1 * self.m[name] + (1 - step.beta1) * d
            rows, columns = self.v[name]
            v = rows[:, None] * columns[None, :] / (rows.mean() * columns.mean()).sqrt()
            moved[name] = step.learning_rate * self.unit**0.5 * self.m[name] / v.sqrt()
        return moved

    def gathered(self, v: Tensor, u: Tensor) -> Tensor:
        beta2 = self.step.beta2
        if self.step.kind is Adaptive.ADAGRAD:
            return v + u
        if self.step.kind is Adaptive.ADAM:
            return beta2 * v + (1 - beta2) * u
        return v - (1 - beta2) * u * torch.sign(v - u)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("kind", list(Adaptive))
def test_it_is_the_dense_rule_over_twenty_rounds(kind: Adaptive, beta1: float) -> None:
    step = AdaptiveStep(kind, 0.7, beta1=beta1, beta2=0.9, epsilon=0.05)
    dense, memory = Dense(step), StepMemory()
    for round in range(20):
        found, memory = step.move(change(round), 0.0, memory)
        for name, expected in dense.move({n: p.delta() for n, p in change(round).items()}).items():
            torch.testing.assert_close(found[name].delta(), expected, rtol=1e-9, atol=1e-12)


def test_the_means_of_squares_are_those_of_the_dense_product() -> None:
    for pair in change(1).values():
        rows, columns = mean_squares(pair)
        torch.testing.assert_close(rows, pair.delta().square().mean(1), rtol=1e-10, atol=1e-18)
        torch.testing.assert_close(columns, pair.delta().square().mean(0), rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("kind", list(Adaptive))
def test_without_momentum_the_rank_of_a_change_stays(kind: Adaptive) -> None:
    step, memory = AdaptiveStep(kind, beta1=0.0), StepMemory()
    for round in range(3):
        moved, memory = step.move(change(round, torch.float32), 0.0, memory)
        assert moved.ranks == dict.fromkeys(SHAPES, RANK)
        assert not memory.velocity
        assert {pair.b_OR.dtype for pair in moved.values()} == {torch.float32}


def test_it_does_not_depend_on_the_size_of_the_changes_but_in_proportion() -> None:
    """The learning rate and epsilon are in units of the first change, so they fit any model."""
    for kind in Adaptive:
        step, plain, large = AdaptiveStep(kind), StepMemory(), StepMemory()
        for round in range(3):
            one, plain = step.move(change(round), 0.0, plain)
            other, large = step.move(change(round).scaled(1000.0), 0.0, large)
            assert distance(one.scaled(1000.0), other) < 1e-9 * norm(other)


def test_where_all_rows_and_columns_change_alike_the_first_step_is_the_plain_one() -> None:
    alike = Adapter({"q": Pair(torch.ones(4, 1, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64))})
    for kind, length in ((Adaptive.ADAGRAD, 1.0), (Adaptive.ADAM, 0.1), (Adaptive.YOGI, 0.1)):
        moved, _ = AdaptiveStep(kind, beta1=0.0, beta2=0.99, epsilon=1e-4).move(alike, 0.0, StepMemory())
        assert length * norm(moved) == pytest.approx(norm(alike), rel=1e-3)


def test_a_change_of_nothing_is_taken_as_it_is() -> None:
    nothing = Adapter({"q": Pair(torch.zeros(4, 1), torch.ones(1, 3))})
    moved, memory = AdaptiveStep(Adaptive.ADAM).move(nothing, 0.0, StepMemory())
    assert moved is nothing
    assert not memory.moments


def test_the_moments_survive_their_files_to_the_last_bit() -> None:
    _, memory = AdaptiveStep(Adaptive.YOGI).move(change(1), 0.0, StepMemory())
    state = ServerState(velocity=memory.velocity, moments=memory.moments)
    files = state_files(state)
    back = read_state(files[TENSORS], files[NUMBERS])
    assert back.moments.keys() == memory.moments.keys()
    assert all(torch.equal(back.moments[key], tensor) for key, tensor in memory.moments.items())
    assert state_files(replace(back)) == files


@pytest.mark.parametrize("method", ["flora", "zero-padding"])
def test_a_run_stopped_after_a_round_goes_on_to_the_same_bits(
    method: str, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    def with_rounds(number: int) -> Settings:
        return settings_for(method__name=method, server__step="fedadam", federation__num_rounds=number)

    run(with_rounds(3), tmp_path / "whole")
    for rounds in (1, 3):
        run(with_rounds(rounds), tmp_path / "parts")
    whole, parts = (tmp_path / f"{name}/adapter/adapter_model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
