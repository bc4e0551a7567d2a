"""How far clients agree: against dense matrices in float64, for every form in which updates cross."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from federation.test_rounds import COHORT, RANKS, SHAPES, ScriptedEngine, plan, run
from torch import Tensor

from fedloom.federation.agreement import Moved
from fedloom.federation.intake import Arrival
from fedloom.federation.module_figures import ModuleFigures, Noise, rounded
from fedloom.federation.robust import Robust, RobustRule
from fedloom.federation.rounds import RoundRecord
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods import table
from fedloom.methods.options import MethodOptions, ServerAdamW
from fedloom.methods.state import Broadcast, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.seeding import torch_stream

EQUAL = Cohort(SHAPES, 3, lambda client: 3, seed=1)
ADAMW = ServerAdamW(
    learning_rate=1e-2,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    max_grad_norm=None,
    schedule="constant",
    warmup_steps=0,
    total_steps=3,
    scale=2.0,
)
ANY_RANKS = [name for name in table.names("aggregates") if not table.traits_of(name).needs_one_rank]


class SeenEngine(ScriptedEngine):
    """Moves the factors that cross, and remembers what every client of every round was sent and sent back."""

    def __init__(self, strategy: Strategy, step: float = 0.1) -> None:
        super().__init__()
        self.strategy, self.step = strategy, step
        self.seen: dict[tuple[int, int], tuple[Broadcast, Update]] = {}

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        for broadcast in broadcasts:
            update = self.trained(broadcast)
            self.seen[broadcast.round, broadcast.client] = broadcast, update
            yield Arrival(update, 100, 200)

    def trained(self, broadcast: Broadcast) -> Update:
        began, sends = broadcast.trained, self.strategy.client.work(broadcast.round).sends
        if isinstance(began, Draw):
            began = began.adapter(SHAPES, broadcast.rank, 1)
        draw = torch_stream(9, broadcast.round, broadcast.client)
        moved = {
            key: t + self.step * torch.randn(t.shape, generator=draw) for key, t in began.as_tensors(sends).items()
        }
        return replace(super().trained(broadcast), adapter=began.with_factors(moved))


def products(update: Adapter, broadcast: Broadcast) -> dict[str, Tensor]:
    """Return every module's change of the product, dense; a fresh draw's product is zero."""
    began = broadcast.trained
    before = {} if isinstance(began, Draw) else {name: pair.to(torch.float64).delta() for name, pair in began.items()}
    return {name: pair.to(torch.float64).delta() - before.get(name, 0.0) for name, pair in update.items()}


def factors(update: Adapter, broadcast: Broadcast) -> dict[str, Tensor]:
    """Return every module's change of the factors that cross, as a vector, padded to the largest rank."""
    began = broadcast.trained
    assert isinstance(began, Adapter)
    return {name: vector(pair.b_OR - began[name].b_OR, pair.a_RI - began[name].a_RI) for name, pair in update.items()}


def gradients(update: Adapter, _: Broadcast) -> dict[str, Tensor]:
    return {name: vector(pair.b_OR, pair.a_RI) for name, pair in update.items()}


def vector(b_OR: Tensor, a_RI: Tensor) -> Tensor:
    missing = 3 - a_RI.shape[0]
    b_OR, a_RI = torch.nn.functional.pad(b_OR, (0, missing)), torch.nn.functional.pad(a_RI, (0, 0, 0, missing))
    return torch.cat([b_OR.flatten(), a_RI.flatten()]).double()


Changes = Callable[[Adapter, Broadcast], dict[str, Tensor]]


def check(records: Sequence[RoundRecord], engine: SeenEngine, changes_of: Changes) -> None:
    """Hold every round's figures against dense ones, by module and in all."""
    for record in records:
        weights = {one.client: one.weight for one in record.clients if one.weight}
        changes = {
            client: changes_of(engine.seen[record.round, client][1].adapter, engine.seen[record.round, client][0])
            for client in weights
        }
        for figures in record.figures.modules:
            one = {client: change[figures.module].flatten() for client, change in changes.items()}
            expected(weights, one, figures.agreement, figures.cosine)
        together = {
            client: torch.cat([part.flatten() for part in change.values()]) for client, change in changes.items()
        }
        in_all = record.figures.agreement
        assert in_all is not None
        expected(weights, together, in_all.ratio, in_all.cosine)


def expected(weights: dict[int, float], changes: dict[int, Tensor], ratio: float | None, cosine: float | None) -> None:
    mean = sum(weights[client] * change for client, change in changes.items())
    squares = sum(weights[client] * float(change.square().sum()) for client, change in changes.items())
    assert ratio == pytest.approx(float(mean.square().sum()) / squares, rel=1e-5)  # type: ignore[union-attr]
    pairs = [
        (weights[k] * weights[j] * float(changes[k].norm() * changes[j].norm()), changes[k], changes[j])
        for k, j in combinations(changes, 2)
    ]
    cosines = sum(size * float(torch.cosine_similarity(one, other, dim=0)) for size, one, other in pairs)
    assert cosine == pytest.approx(cosines / sum(size for size, *_ in pairs), abs=1e-5)


@pytest.mark.parametrize("name", ANY_RANKS)
def test_agreement_is_that_of_the_dense_changes_of_clients_of_different_ranks(name: str) -> None:
    strategy = table.make(name, COHORT, MethodOptions())
    engine = SeenEngine(strategy)
    check(run(plan(strategy), engine), engine, products)


@pytest.mark.parametrize("name", ["fedit", "fedex-lora"])
def test_agreement_is_that_of_the_dense_changes_at_one_rank(name: str) -> None:
    strategy = table.make(name, EQUAL, MethodOptions())
    engine = SeenEngine(strategy)
    check(run(plan(strategy, ranks=dict.fromkeys(RANKS, 3)), engine), engine, products)


def test_where_no_product_is_known_the_factors_that_cross_are_compared() -> None:
    strategy = table.make("fedsa-lora", EQUAL, MethodOptions())
    engine = SeenEngine(strategy)
    check(run(plan(strategy, ranks=dict.fromkeys(RANKS, 3)), engine), engine, factors)


@pytest.mark.parametrize("name", ["weave", "zero-padding"])
def test_where_gradients_cross_they_are_compared(name: str) -> None:
    strategy = table.make(name, COHORT, MethodOptions(adamw=ADAMW))
    engine = SeenEngine(strategy)
    check(run(plan(strategy), engine), engine, gradients)


def test_a_robust_rule_is_seen_through_what_it_leaves() -> None:
    strategy = table.make("zero-padding", COHORT, MethodOptions())
    records = run(plan(strategy, robust=RobustRule(Robust.MEDIAN, 0.3)), SeenEngine(strategy))
    assert all(0.0 < one.agreement <= 1.0 for record in records for one in record.figures.modules)


def test_one_client_agrees_with_itself_and_with_nobody_else() -> None:
    strategy = table.make("zero-padding", COHORT, MethodOptions())
    record = run(plan(strategy, sample=lambda round: [1]), SeenEngine(strategy))[-1]
    assert [(one.agreement, one.cosine) for one in record.figures.modules] == [(pytest.approx(1.0), None)] * 2


def test_small_steps_late_in_a_run_are_still_told_from_rounding() -> None:
    strategy = table.make("zero-padding", COHORT, MethodOptions())
    big = {name: Pair(p.b_OR + 30.0, p.a_RI * 30.0) for name, p in strategy.initial().start.items()}
    engine = SeenEngine(strategy, step=1e-2)
    check(run(plan(strategy), engine, replace(strategy.initial(), start=Adapter(big))), engine, products)


def test_nothing_is_said_of_clients_that_did_not_move() -> None:
    still = Moved()
    still.add(1e-17, 1.0, began=1.0)
    assert still.agreement(1.0, 1e-17).ratio is None


def test_opposite_clients_cancel_and_unrelated_ones_leave_their_share() -> None:
    moved = Moved()
    for _ in range(2):
        moved.add(4.0, 3.0)
    assert (moved.agreement(6.0, 0.0).ratio, moved.agreement(6.0, 0.0).cosine) == (0.0, -1.0)
    assert (moved.agreement(6.0, 2.0).ratio, moved.agreement(6.0, 2.0).cosine) == (0.5, 0.0)
    assert (moved.agreement(6.0, 4.0).ratio, moved.agreement(6.0, 4.0).cosine) == (1.0, 1.0)
    assert moved.agreement(6.0, 4.0).client_norm == 2.0


def test_noise_and_change_of_a_module_are_dense_ones_and_add_up_to_those_of_the_round() -> None:
    strategy = table.make("zero-padding", COHORT, MethodOptions())
    engine = SeenEngine(strategy)
    records = run(plan(strategy), engine)
    before, after = (record.state.global_adapter() for record in records[-2:])
    for one in records[-1].figures.modules:
        change = after[one.module].to(torch.float64).delta() - before[one.module].to(torch.float64).delta()
        assert one.change_norm == pytest.approx(float(change.norm()), rel=1e-5)
        mean = sum(
            client.weight * engine.seen[3, client.client][1].adapter[one.module].to(torch.float64).delta()
            for client in records[-1].clients
        )
        off = after[one.module].to(torch.float64).delta() - mean
        assert one.aggregation_noise == pytest.approx(float(off.norm() / mean.norm()), rel=1e-5)
    assert records[-1].figures.change_norm == pytest.approx(
        math.hypot(*(m.change_norm for m in records[-1].figures.modules))
    )
    assert Noise.of(Adapter(), Adapter()).in_all is None


def test_figures_are_kept_with_six_digits() -> None:
    one = ModuleFigures("m", 1.23456789, None, 0.123456789, -1e-9, 2.0)
    assert one.as_dict() == {
        "module": "m",
        "change_norm": 1.23457,
        "aggregation_noise": None,
        "agreement": 0.123457,
        "cosine": -1e-9,
        "client_norm": 2.0,
    }
    assert rounded(None) is None
