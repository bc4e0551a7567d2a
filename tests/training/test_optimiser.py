"""AdamW per client: the schedule, the clipping, the state that goes in and out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedloom.errors import AdapterError, SettingsError
from fedloom.training.optimiser import AdamWSettings, ClientOptimiser, first_step, schedule, step_together

SETTINGS = AdamWSettings(0.1, weight_decay=0.2)


def factors(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(2, 3, dtype=torch.float64, generator=generator)) for n in ("m.a_RI", "m.bt_RO")}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = torch.sin(torch.arange(6, dtype=torch.float64).view(2, 3) + step + i)


def run(optimiser: ClientOptimiser, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step)
        optimiser.step()


def test_schedules_by_hand() -> None:
    assert [schedule("constant", 3, 9)(i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [schedule("linear", 0, 4)(i) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [round(schedule("cosine", 0, 4)(i), 6) for i in range(5)] == [1.0, 0.853553, 0.5, 0.146447, 0.0]


def test_no_step_of_a_run_has_a_rate_of_zero() -> None:
    for kind in ("constant", "linear", "cosine"):
        assert all(schedule(kind, 2, 6)(i) > 0 for i in range(6))


def test_a_schedule_over_the_round_starts_anew_and_one_over_the_run_goes_on() -> None:
    assert first_step("round", 3, 5, 10) == (0, 10)
    assert first_step("run", 3, 5, 10) == (20, 50)
    with pytest.raises(SettingsError, match="expected a round from 1 to 5 of the run, got 6; raise"):
        first_step("run", 6, 5, 10)


def test_steps_equal_torchs_adamw() -> None:
    ours, theirs = factors(), factors()
    adamw = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.2)
    optimiser = ClientOptimiser(ours, SETTINGS, lambda _: 1.0)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimiser.step()
        adamw.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-14)


def test_only_the_clients_own_norm_is_clipped() -> None:
    parameters = factors()
    set_gradients(parameters, 0)
    before = {name: p.grad.clone() for name, p in parameters.items()}
    norm = torch.stack([g.norm() for g in before.values()]).norm()
    ClientOptimiser(parameters, AdamWSettings(0.1, max_grad_norm=0.5), lambda _: 1.0).step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, before[name] * 0.5 / norm, rtol=1e-5, atol=0)


def test_clients_that_step_in_one_call_step_as_torchs_own_alone() -> None:
    """Of three sizes and two learning rates, the last for fewer steps; one of them has a gradient of infinity."""
    settings = AdamWSettings(0.1, weight_decay=0.2, max_grad_norm=0.5)
    clients = [{f"m.{k}": nn.Parameter(torch.linspace(-1, 1, 5 * size + k)) for k in range(3)} for size in (3, 7, 20)]
    theirs = [[nn.Parameter(factor.detach().clone()) for factor in client.values()] for client in clients]
    rates = [1.0, 0.5, 1.0]
    ours = [ClientOptimiser(own, settings, lambda _, r=r: r) for own, r in zip(clients, rates, strict=True)]
    alone = [
        torch.optim.AdamW(own, 0.1 * r, weight_decay=0.2, fused=True) for own, r in zip(theirs, rates, strict=True)
    ]
    for step in range(4):
        active = [0, 1, 2] if step < 3 else [0, 1]
        for k in active:
            for i, (mine, same) in enumerate(zip(clients[k].values(), theirs[k], strict=True)):
                mine.grad = torch.sin(torch.arange(mine.numel()) * (k + 1.0) + step + i)
                mine.grad[0] = math.inf if step == 2 and k == 1 else 0.0
                same.grad = mine.grad.clone()
            nn.utils.clip_grad_norm_(theirs[k], 0.5)
            alone[k].step()
        assert step_together([ours[k] for k in active]) == [0.1 * rates[k] for k in active]
    for mine, same in zip(clients, theirs, strict=True):
        for a, b in zip(mine.values(), same, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert [bool(torch.isfinite(client["m.0"]).all()) for client in clients] == [True, False, True]


def test_an_exported_state_goes_on_exactly() -> None:
    whole, cut = factors(), factors()
    run(ClientOptimiser(whole, SETTINGS, lambda _: 1.0), whole, range(6))
    first = ClientOptimiser(cut, SETTINGS, lambda _: 1.0)
    run(first, cut, range(3))
    state = first.export_state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    run(ClientOptimiser(cut, SETTINGS, lambda _: 1.0, state=state), cut, range(3, 6))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_without_a_state_the_moments_are_fresh() -> None:
    parameters = factors()
    run(ClientOptimiser(parameters, SETTINGS, lambda _: 1.0), parameters, range(3))
    fresh = ClientOptimiser(parameters, SETTINGS, lambda _: 1.0)
    assert fresh.export_state() == {}
    run(fresh, parameters, range(1))
    assert fresh.export_state()["m.a_RI.step"] == 1


def test_a_state_of_other_factors_is_refused() -> None:
    parameters = factors()
    with pytest.raises(AdapterError, match="foreign or missing"):
        ClientOptimiser(parameters, SETTINGS, lambda _: 1.0, state={"other.step": torch.ones(())})
    optimiser = ClientOptimiser(parameters, SETTINGS, lambda _: 1.0)
    run(optimiser, parameters, range(1))
    state = optimiser.export_state() | {"m.a_RI.exp_avg": torch.zeros(4, 3)}
    with pytest.raises(AdapterError, match=r"m\.a_RI\.exp_avg: expected an optimiser state of shape \(2, 3\)"):
        ClientOptimiser(parameters, SETTINGS, lambda _: 1.0, state=state)
