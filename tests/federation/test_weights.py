"""Nobody's word is a weight: shares are capped, updates wait unharmed, and counts are held against what was asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import UpdateError
from fedloom.federation.intake import Arrival
from fedloom.federation.rounds import RoundPlan, RoundRecord, run_rounds
from fedloom.federation.server import ServerRules
from fedloom.federation.update_checks import Asked, check_stats
from fedloom.federation.waiting import Waiting
from fedloom.federation.weights import capped
from fedloom.lora.algebra import distance, stack
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.fedex import FedEx
from fedloom.methods.flora import FLoRA
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.state import Broadcast, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"layers.0.q": (12, 10), "layers.1.v": (8, 10)}
NUM_ROWS = {0: 90, 1: 5, 2: 5}
COHORT = Cohort(SHAPES, 2, lambda client: 2, seed=1)


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    st.floats(0.01, 1.0),
)
def test_capped_weights_are_shares_below_the_cap_that_keep_the_order(weights: list[float], largest: float) -> None:
    given_weights = dict(enumerate(weights))
    found = capped(given_weights, largest)
    if max(weights) <= largest * sum(weights):
        assert found == given_weights
        return
    assert sum(found.values()) == pytest.approx(1.0)
    assert max(found.values()) <= max(largest, 1 / len(weights)) + 1e-12
    assert all(found[i] <= found[j] + 1e-12 for i in found for j in found if weights[i] <= weights[j])


def test_what_is_cut_goes_to_the_others_in_proportion() -> None:
    assert capped({0: 90.0, 1: 6.0, 2: 4.0}, 0.5) == pytest.approx({0: 0.5, 1: 0.3, 2: 0.2})
    assert capped({0: 90.0, 1: 9.0, 2: 1.0}, 0.4) == pytest.approx({0: 0.4, 1: 0.4, 2: 0.2})
    assert capped({0: 90.0, 1: 9.0}, 0.3) == {0: 0.5, 1: 0.5}
    assert capped({-1: 90.0, 1: 9.0, 2: 1.0}, 0.05, trusted=(-1,)) == pytest.approx(
        {-1: 0.95 * 90 / 91, 1: 0.05, 2: 0.95 / 91}
    )


class Engine:
    """Every client moves by noise of its own; client 0 by ``size`` times as much."""

    def __init__(self, size: float = 1.0) -> None:
        self.size, self.updates = size, list[Update]()

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        for sent in broadcasts:
            start = sent.start.adapter(SHAPES, sent.rank, 1) if isinstance(sent.start, Draw) else sent.start
            generator = torch_stream(sent.round, sent.client)
            size = self.size if sent.client == 0 else 1.0
            moved = {
                n: Pair(p.b_OR + size * torch.randn(p.b_OR.shape, generator=generator), p.a_RI)
                for n, p in start.items()
            }
            stats = TrainingStats(NUM_ROWS[sent.client], 40, 30, 4, 2.0)
            self.updates.append(Update(sent.round, sent.client, Adapter(moved), stats))
            yield Arrival(self.updates[-1], 0, 0)


def rounds(strategy: Strategy, engine: Engine, num_rounds: int = 1, **changes: object) -> list[RoundRecord]:
    ranks, scales = dict.fromkeys(NUM_ROWS, 2), dict.fromkeys(NUM_ROWS, 2.0)
    plan = RoundPlan(
        num_rounds,
        strategy,
        ServerRules(PlainStep()),
        lambda round: [0, 1, 2],
        SHAPES,
        ranks,
        scales,
        lambda client: Asked(NUM_ROWS[client], 4, 40),
    )
    return list(run_rounds(strategy.initial(), replace(plan, **changes), engine, lambda state: {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [FLoRA, FedEx])
def test_the_cap_is_what_the_aggregate_weighs_by(make: type[FLoRA] | type[FedEx]) -> None:
    engine = Engine()
    [record] = rounds(make(COHORT), engine, max_weight=0.4)
    assert [client.weight for client in record.clients] == pytest.approx([0.4, 0.3, 0.3])
    expected = stack([update.adapter for update in engine.updates], [0.4, 0.3, 0.3])
    assert distance(record.applied, expected) < 1e-5


def test_the_first_round_is_held_against_its_own_median_and_later_ones_against_the_last() -> None:
    first = rounds(FLoRA(COHORT), Engine(1e3))[0]
    assert [client.reason is None for client in first.clients] == [False, True, True]
    assert first.clients[0].norm is not None
    later = rounds(FLoRA(COHORT), Engine(50.0), num_rounds=2)
    assert all(client.reason is None for record in later for client in record.clients)


# ---- updates that wait ---------------------------------------------------------------------------------------------


def test_updates_wait_on_disk_to_the_bit_and_in_their_layout_and_order() -> None:
    generator = torch_stream(3)
    updates = []
    for client in range(6):
        wide = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        pair = Pair(wide[:, :3], torch.randn(10, 3, generator=generator, dtype=torch.float64).T)
        updates.append(Update(1, client, Adapter({"layers.0.q": pair}), TrainingStats(client + 1)))
    with Waiting(bytes_in_memory=2 * updates[0].adapter.num_bytes) as waiting:
        for update in updates:
            waiting.put(update)
        assert sum(isinstance(one, Update) for one in waiting._held) == 2
        for _ in range(2):
            back = list(waiting)
            assert [update.client for update in back] == list(range(6))
            for ours, theirs in zip(updates, back, strict=True):
                assert ours.stats == theirs.stats
                for left, right in zip(ours.adapter.values(), theirs.adapter.values(), strict=True):
                    for one, other in ((left.b_OR, right.b_OR), (left.a_RI, right.a_RI)):
                        assert torch.equal(one, other)
                        assert one.stride() == other.stride()


# ---- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_rows", 11), ("num_rows", 9), ("num_steps", 5), ("num_tokens", 81), ("num_loss_tokens", 71)],
)
def test_counts_beyond_what_was_asked_are_refused(name: str, value: int) -> None:
    stats, asked = TrainingStats(10, 70, 30, 4), Asked(10, 4, 80)
    check_stats(stats, asked)
    with pytest.raises(UpdateError, match=f"{name}: expected"):
        check_stats(replace(stats, **{name: value}), asked)  # type: ignore[arg-type]
