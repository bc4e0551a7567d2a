"""A prior of n steps is what AdamW has after n steps of that gradient, and only row and column means of it cross."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedloom.lora.pair import Adapter, Pair
from fedloom.training.moments import COLUMNS, ROWS, Prior, means_of, moved_by, state_of
from fedloom.training.optimiser import AdamWSettings, ClientOptimiser

BETAS, RATE = (0.9, 0.999), 1e-2


def optimiser(factors: dict[str, nn.Parameter], state: dict[str, torch.Tensor] | None = None) -> ClientOptimiser:
    return ClientOptimiser(factors, AdamWSettings(RATE, BETAS), lambda step: 1.0, state=state)


def parameters(rank: int = 2) -> dict[str, nn.Parameter]:
    return {"m.a_RI": nn.Parameter(torch.zeros(rank, 3)), "m.bt_RO": nn.Parameter(torch.zeros(rank, 4))}


def gradients(rank: int = 2) -> dict[str, torch.Tensor]:
    """Return gradients whose squares are of rank one, which row and column means hold exactly."""
    slots, ins, outs = torch.tensor([1.0, 3.0])[:rank], torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 1, -1, 4])
    return {"m.a_RI": slots[:, None] * ins, "m.bt_RO": slots[:, None] * outs}


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_a_prior_is_what_so_many_steps_of_one_gradient_leave(num_steps: int, scale: float) -> None:
    factors = parameters()
    taken = optimiser(factors)
    for _ in range(num_steps):
        for name, gradient in gradients().items():
            factors[name].grad = gradient.clone()
        taken.step()
    state = taken.export_state()
    ended = Adapter({"m": Pair(factors["m.bt_RO"].detach().T * scale, factors["m.a_RI"].detach())})
    start = Adapter({"m": Pair(torch.zeros(4, 2), torch.zeros(2, 3))})
    prior = Prior(means_of(state, scale, BETAS[1]), moved_by(ended, start, 1), num_steps)
    found = state_of(prior, {"m": 2}, scale, betas=BETAS, learning_rate=RATE, num_steps=num_steps)
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.allclose(found[key], tensor, rtol=1e-4), key


def test_an_optimiser_with_a_prior_goes_on_as_one_that_took_the_steps() -> None:
    first, second = parameters(), parameters()
    taken = optimiser(first)
    for _ in range(3):
        for name, gradient in gradients().items():
            first[name].grad = gradient.clone()
        taken.step()
    ended = Adapter({"m": Pair(first["m.bt_RO"].detach().T.clone(), first["m.a_RI"].detach().clone())})
    start = Adapter({"m": Pair(torch.zeros(4, 2), torch.zeros(2, 3))})
    prior = Prior(means_of(taken.export_state(), 1.0, BETAS[1]), moved_by(ended, start, 1), 3)
    state = state_of(prior, {"m": 2}, 1.0, betas=BETAS, learning_rate=RATE, num_steps=3)
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    other = optimiser(second, state)
    for factors, one in ((first, taken), (second, other)):
        for name, gradient in gradients().items():
            factors[name].grad = 2.0 * gradient
        one.step()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-5)


def test_the_moments_of_a_client_of_smaller_rank_are_those_of_its_first_slots() -> None:
    state = {"m.a_RI.step": torch.tensor(1.0), "m.a_RI.exp_avg_sq": torch.rand(4, 3)}
    whole = means_of(state, 1.0, BETAS[1])
    assert {key: len(t) for key, t in whole.items()} == {f"m.a{ROWS}": 4, f"m.a{COLUMNS}": 3}
    all_slots = state_of(Prior(whole, None, 2), {"m": 4}, 1.0, betas=BETAS, learning_rate=RATE, num_steps=1)
    few = state_of(Prior(whole, None, 2), {"m": 2}, 1.0, betas=BETAS, learning_rate=RATE, num_steps=1)
    assert torch.equal(few["m.a_RI.exp_avg_sq"], all_slots["m.a_RI.exp_avg_sq"][:2])
    assert not few["m.a_RI.exp_avg"].any()


def test_a_move_over_several_rounds_counts_by_the_round() -> None:
    start, before = (Adapter({"m": Pair(torch.full((2, 1), x), torch.full((1, 2), x))}) for x in (3.0, 1.0))
    assert moved_by(start, before, 4)["m"].a_RI.tolist() == [[0.5, 0.5]]
