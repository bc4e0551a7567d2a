"""The first A spans what the clients' mean gradient has most of; the method then goes on as it would have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedloom.errors import MethodError
from fedloom.lora.algebra import right_space
from fedloom.lora.initial import Draw, fresh_adapter
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods import table
from fedloom.methods.client_half import Payload
from fedloom.methods.gradient_start import OVERSAMPLING, GradientStart
from fedloom.methods.optional_parts import with_options
from fedloom.methods.options import MethodOptions
from fedloom.methods.state import Update
from fedloom.methods.strategy import Cohort
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"wide": (40, 60), "narrow": (30, 6)}
RANKS = {0: 4, 1: 2, 2: 1}
COHORT = Cohort(SHAPES, 4, RANKS.__getitem__, seed=1)
OPTIONS = MethodOptions(initialisation="gradient")


def orthonormal(rows: int, columns: int, *seed: int | str) -> Tensor:
    draw = torch.randn(columns, rows, dtype=torch.float64, generator=torch_stream(5, *seed))
    return torch.linalg.qr(draw).Q.T


def planted(client: int) -> dict[str, Tensor]:
    """Return a gradient whose right space all clients share, a direction weaker than the one before."""
    found = {}
    for name, (num_out, num_in) in SHAPES.items():
        left = torch.eye(3, dtype=torch.float64) + 0.1 * orthonormal(3, 3, "turn", client)
        strength = torch.tensor([9.0, 3.0, 1.0], dtype=torch.float64)
        sides = orthonormal(3, num_out, name, "left").T @ left, orthonormal(3, num_in, name, "right")
        found[name] = sides[0] * strength @ sides[1]
    return found


def sketch_of(strategy: GradientStart, client: int, rows: int = 10) -> Update:
    drawn = strategy.start_for(strategy.initial(), client)
    assert isinstance(drawn, Draw)
    omega, dense = drawn.adapter(SHAPES, drawn.rank or 0, COHORT.seed), planted(client)
    pairs = {n: Pair(torch.zeros_like(p.b_OR), (p.b_OR.double().T @ dense[n]).float()) for n, p in omega.items()}
    return Update(1, client, Adapter(pairs), TrainingStats(rows))


def made(name: str = "zero-padding", options: MethodOptions = OPTIONS) -> GradientStart:
    strategy = table.make(name, COHORT, options)
    assert isinstance(strategy, GradientStart)
    return strategy


def test_a_spans_the_largest_right_singular_directions_in_their_order_at_the_length_of_a_random_one() -> None:
    strategy = made()
    start = strategy.aggregate(strategy.initial(), [sketch_of(strategy, 0)]).start
    assert start is not None
    drawn = strategy.initial().start
    assert drawn is not None
    random_rows = fresh_adapter({"m": (500, 300)}, 300, 1, "any")["m"].a_RI
    for name, pair in start.items():
        _, _, vt = torch.linalg.svd(planted(0)[name], full_matrices=False)
        a_RI = pair.a_RI.double()
        cosines = (a_RI[:3] @ vt[:3].T) * 3**0.5
        # the sketch is wide enough for the space; the order within it is only nearly that of the gradient
        assert torch.allclose(torch.linalg.svdvals(cosines), torch.ones(3, dtype=torch.float64), atol=1e-5)
        assert float(cosines[0, 0].abs()) > 0.9
        lengths = a_RI[:3].norm(dim=1)
        assert torch.allclose(lengths, torch.full_like(lengths, (1 / 3) ** 0.5), atol=1e-6)
        assert torch.equal(pair.a_RI[3:], drawn[name].a_RI[3:]), "a slot without a direction keeps its draw"
        assert not pair.b_OR.any()
    assert float(random_rows.square().sum(dim=1).mean()) == pytest.approx(1 / 3, rel=0.02)


def test_the_sketches_are_a_sum_by_the_methods_weights_and_one_that_is_lost_is_only_absent() -> None:
    strategy = made()
    state = strategy.initial()
    sketches = [sketch_of(strategy, client, rows=10 * (client + 1)) for client in RANKS]
    found = strategy.aggregate(state, sketches)
    assert found.weights == pytest.approx({0: 1 / 6, 1: 2 / 6, 2: 3 / 6})
    assert found.start is not None
    for taken in ([0, 1, 2], [0, 2]):
        dense = {name: sum((client + 1) * planted(client)[name] for client in taken) for name in SHAPES}
        start = strategy.aggregate(state, [sketches[client] for client in taken]).start
        assert start is not None
        for name, pair in start.items():
            drawn = Draw(("sketch",), 4 + OVERSAMPLING, random="b").adapter(SHAPES, 4 + OVERSAMPLING, 1)[name]
            wanted = right_space(drawn.b_OR.double().T @ dense[name], 3)
            assert torch.allclose(pair.a_RI[:3].double() * 3**0.5, wanted, atol=1e-4)
    parts = [strategy.empty(state) for _ in sketches]
    for part, one in zip(parts, sketches, strict=True):
        part.add(one)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    merged = strategy.finish(state, parts[2]).start
    assert merged is not None
    assert all(torch.allclose(merged[n].a_RI, pair.a_RI, atol=1e-6) for n, pair in found.start.items())


def test_a_sketch_of_nothing_leaves_the_draw() -> None:
    strategy = made()
    state, one = strategy.initial(), sketch_of(strategy, 0)
    nothing = replace(one, adapter=one.adapter.with_factors({"wide.a": torch.zeros(12, 60)}))
    start = strategy.aggregate(state, [nothing]).start
    assert start is not None
    assert state.start is not None
    assert torch.equal(start["wide"].a_RI, state.start["wide"].a_RI)
    assert not torch.equal(start["narrow"].a_RI, state.start["narrow"].a_RI)


@pytest.mark.parametrize("name", table.shipped("continues"))
def test_after_the_sketch_the_methods_own_rounds_follow(name: str) -> None:
    plain, strategy = table.make(name, COHORT), made(name)
    assert strategy.client.work(1).payload is Payload.SKETCH
    assert [strategy.client.work(n + 1) for n in range(1, 5)] == [plain.client.work(n) for n in range(1, 5)]
    state = strategy.initial()
    begun = strategy.aggregate(state, [sketch_of(strategy, 0)]).start
    after = replace(state, round=1, start=begun)
    start, own = strategy.start_for(after, 1), plain.start_for(replace(after, round=0), 1)
    assert isinstance(start, Adapter)
    assert all(torch.equal(pair.a_RI, own[n].a_RI) for n, pair in start.items())
    assert start["wide"].rank in (RANKS[1], COHORT.max_rank)


def test_a_method_whose_clients_share_no_start_is_refused() -> None:
    strategy = with_options(table.make("flora", COHORT), OPTIONS, starts_fresh=True)
    with pytest.raises(MethodError, match="share a start with gradient, got flora; choose another method"):
        strategy.initial()
