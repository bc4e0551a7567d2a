"""The numbers of an explanation against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fedloom.explanation.facts import ModuleFacts, changes_between, history_of, round_facts, shapes_of
from fedloom.explanation.moments import FactorMoments, adamw_moments, shared_moments
from fedloom.explanation.pairs import cosines_of, pairs_of
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods import table
from fedloom.methods.options import MethodOptions
from fedloom.methods.strategy import Cohort
from fedloom.reporting.spectra import Spectrum
from fedloom.seeding import torch_stream
from fedloom.training.moments import Prior, means_of, moved_by, state_of

SHAPES = {"layers.0.q": (12, 10), "layers.1.v": (8, 10)}


def drawn(seed: int, rank: int = 3) -> Adapter:
    generator = torch_stream(seed, "facts")
    return Adapter(
        {
            name: Pair(torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator))
            for name, (out, into) in SHAPES.items()
        }
    )


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    return adapter[name].to(torch.float64).delta()


def test_ranks_and_norms_are_those_of_the_dense_product() -> None:
    adapter = drawn(1)
    for name, (out_in, shape) in shapes_of([adapter], adapter).items():
        sigma = torch.linalg.svdvals(dense(adapter, name))
        shares = sigma[:3] / sigma[:3].sum()
        assert out_in == SHAPES[name]
        assert (shape.rank, shape.numerical_rank) == (3, 3)
        assert shape.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)
        assert shape.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-6)
        assert shape.norm == pytest.approx(float(dense(adapter, name).norm()), rel=1e-6)
        assert shape.a_norm == pytest.approx(float(adapter[name].a_RI.norm()), rel=1e-6)
        assert shape.b_norm == pytest.approx(float(adapter[name].b_OR.norm()), rel=1e-6)


def test_a_rank_is_counted_by_what_is_used_of_it() -> None:
    assert Spectrum("m", (9, 9), 4, (1.0, 1.0, 1.0, 1.0)).effective_rank == pytest.approx(4.0)
    one = Spectrum("m", (9, 9), 4, (2.0, 0.0, 0.0, 1e-9))
    assert (one.numerical_rank, one.stable_rank) == (1, pytest.approx(1.0))
    assert one.effective_rank == pytest.approx(1.0, abs=1e-6)
    nothing = Spectrum("m", (9, 9), 4, (0.0,) * 4)
    assert (nothing.numerical_rank, nothing.effective_rank, nothing.stable_rank) == (0, 0.0, 0.0)


def test_of_several_clients_adapters_the_means_are_given_and_no_spectrum() -> None:
    one, other = drawn(1), drawn(2, rank=2)
    (_, mean), (_, first), (_, second) = (
        shapes_of(adapters, Adapter())["layers.0.q"] for adapters in ([one, other], [one], [other])
    )
    assert (mean.rank, mean.singular_values) == (2.5, ())
    assert mean.norm == pytest.approx((first.norm + second.norm) / 2)
    assert mean.a_norm == pytest.approx((first.a_norm + second.a_norm) / 2)


def test_a_change_is_the_dense_difference_and_a_first_round_all_there_is() -> None:
    before, after = drawn(1), drawn(2, rank=2)
    for name, value in changes_between(after, before).items():
        assert value == pytest.approx(float((dense(after, name) - dense(before, name)).norm()), rel=1e-6)
    for name, value in changes_between(after, Adapter()).items():
        assert value == pytest.approx(float(dense(after, name).norm()), rel=1e-6)


@pytest.mark.parametrize("name", ["zero-padding", "flora", "weave", "ffa-lora"])
def test_cosines_of_two_clients_are_the_dense_ones(name: str) -> None:
    ranks = {0: 3, 1: 2, 2: 3}
    strategy = table.make(name, Cohort(SHAPES, 3, ranks.__getitem__, seed=1), MethodOptions())
    state = strategy.initial()
    uploads = {client: drawn(client + 5, rank) for client, rank in ranks.items()}
    if name == "ffa-lora":
        first = strategy.initial().start
        uploads = {
            k: Adapter({n: Pair(p.b_OR, first[n].a_RI[: p.rank]) for n, p in a.items()}) for k, a in uploads.items()
        }
    found = pairs_of(uploads, state, strategy, ranks)
    flat = {k: torch.cat([dense(one, name).flatten() for name in SHAPES]) for k, one in uploads.items()}
    assert found.cosines[0][2] == pytest.approx(float(torch.cosine_similarity(flat[0], flat[2], dim=0)), abs=1e-9)
    q = {k: dense(one, "layers.0.q").flatten() for k, one in uploads.items()}
    two = [float(torch.cosine_similarity(q[k], q[j], dim=0)) for k, j in ((0, 1), (0, 2), (1, 2))]
    assert found.mean_of_module["layers.0.q"] == pytest.approx(sum(two) / 3, abs=1e-9)
    assert found.of_module["layers.0.q"][1][2] == pytest.approx(two[2], abs=1e-9)
    least, most = found.extremes  # type: ignore[misc]
    assert least[2] <= most[2]


def test_what_a_client_keeps_is_no_part_of_the_comparison() -> None:
    strategy = table.make("fedsa-lora", Cohort(SHAPES, 3, lambda client: 3, seed=1), MethodOptions())
    start = strategy.initial().start
    uploads = {k: start.with_factors(drawn(k).as_tensors(frozenset("a"))) for k in (1, 2)}
    found = pairs_of(uploads, strategy.initial(), strategy, {1: 3, 2: 3})
    moved = [torch.cat([(uploads[k][n].a_RI - start[n].a_RI).double().flatten() for n in SHAPES]) for k in (1, 2)]
    assert found.cosines[0][1] == pytest.approx(float(torch.cosine_similarity(*moved, dim=0)), abs=1e-9)


def test_one_client_has_nobody_to_agree_with() -> None:
    found = cosines_of((4,), [{"m": drawn(1)}])
    assert (found.extremes, found.mean_of_module) == (None, {"m": None})


def test_the_step_of_adamw_is_what_its_next_update_would_be_long() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimiser = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, eps=0.0)
    moved = torch.zeros(0)
    for seed in range(4):
        parameter.grad = torch.randn(2, 3, generator=torch_stream(seed, "adamw"))
        before = parameter.detach().clone()
        optimiser.step()
        moved = (parameter - before).detach()
    state = {f"m.bt_RO.{key}": value for key, value in optimiser.state[parameter].items()}
    found = adamw_moments([(state, 2.0)], (0.9, 0.99))["m"]["b"]
    assert found.step == pytest.approx(float(moved.square().mean().sqrt()), rel=1e-5)
    v = optimiser.state[parameter]["exp_avg_sq"].mean() / (1 - 0.99**4)
    assert found.gradient == pytest.approx(float(v.sqrt()) / 2.0, rel=1e-5)


def test_the_step_of_shared_moments_is_the_one_that_clients_start_with() -> None:
    start, before, scale, beta1 = drawn(1), drawn(2), 2.0, 0.9
    kept = {
        f"{name}.{parameter}.{key}": value
        for name, pair in start.items()
        for parameter, factor in (("a_RI", pair.a_RI), ("bt_RO", pair.b_OR.T))
        for key, value in (("exp_avg_sq", torch.full_like(factor, 4.0)), ("step", torch.tensor(3.0)))
    }
    second = means_of(kept, scale, beta2=0.99)
    prior = Prior(second, moved_by(start, before, 1), 2)
    begun = state_of(prior, start.ranks, scale, betas=(beta1, 0.99), learning_rate=0.1, num_steps=5)
    found = shared_moments(second, start, before, learning_rate=0.1, steps=5, scale=scale)
    for module in SHAPES:
        for factor, parameter in (("a", "a_RI"), ("b", "bt_RO")):
            m = begun[f"{module}.{parameter}.exp_avg"] / (1 - beta1**2)
            v = begun[f"{module}.{parameter}.exp_avg_sq"] / (1 - 0.99**2)
            assert found[module][factor].step == pytest.approx(float((m / v.sqrt()).square().mean().sqrt()), rel=1e-5)
    assert found["layers.0.q"]["a"].gradient == pytest.approx(math.sqrt(4.0 / (1 - 0.99**3)), rel=1e-5)
    assert found["layers.0.q"]["b"].gradient == pytest.approx(math.sqrt(4.0 / (1 - 0.99**3)) / scale, rel=1e-5)
    assert shared_moments(second, start, None, learning_rate=0.1, steps=5, scale=2.0)["layers.0.q"]["a"].step is None


def facts(module: str, agreement: float | None, norm: float) -> ModuleFacts:
    return ModuleFacts(module, None, None, norm, 0.1, agreement, 0.2, norm, {"a": FactorMoments(1.0, None)})


def test_a_line_of_some_modules_adds_up_what_they_did() -> None:
    modules = [facts("one", 1.0, 3.0), facts("two", 0.5, 4.0)]
    record = {"round": 2, "eval": {"loss_nats": 2.5}, "agreement": 0.9, "cosine": 0.8, "aggregation_noise": 0.7}
    some = round_facts(record, modules, is_whole=False)
    assert some.agreement == pytest.approx((9.0 + 8.0) / 25.0)
    assert (some.change_norm, some.aggregation_noise, some.cosine) == (5.0, pytest.approx(0.1), pytest.approx(0.2))
    whole = round_facts(record, modules, is_whole=True)
    assert (whole.agreement, whole.cosine, whole.aggregation_noise, whole.loss_nats) == (0.9, 0.8, 0.7, 2.5)


def test_a_history_has_a_place_for_every_round() -> None:
    history = history_of([[facts("one", 1.0, 3.0)], [facts("one", 0.5, 2.0), facts("two", None, 1.0)]])
    assert history["one"]["agreement"] == (1.0, 0.5)
    assert history["two"]["change_norm"] == (None, 1.0)
    assert "agreement" not in history["two"]
    assert "effective_rank" not in history["one"]
