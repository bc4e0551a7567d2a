"""FedSA-LoRA: the mean of A alone; every B is its client's, and the server knows no product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.clients.memory import Memory, own_adapters
from fedloom.errors import UpdateError
from fedloom.federation.server import aggregation_noise
from fedloom.federation.update_checks import check_update
from fedloom.lora.pair import BOTH, Adapter, Pair
from fedloom.methods.fedsa import FedSALoRA
from fedloom.methods.state import Broadcast, News, Update
from fedloom.methods.strategy import Cohort
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"layers.0.q": (6, 5), "layers.1.v": (3, 5)}
COHORT = Cohort(SHAPES, 2, lambda client: 2, seed=1)
ROWS = (10, 20, 30)


def arrived(client: int, seed: int | None = None) -> Update:
    """Return an update as the server reads it: A as trained, B as the server has it."""
    start = FedSALoRA(COHORT).initial().start
    assert start is not None
    draw = torch_stream(client if seed is None else seed, "a")
    a = {f"{name}.a": torch.randn(pair.a_RI.shape, generator=draw) for name, pair in start.items()}
    stats = TrainingStats(ROWS[client], 70, 30, 4, 2.0, 1.5, 0.1)
    return Update(1, client, start.with_factors(a), stats)


def test_a_is_the_mean_by_rows_and_the_servers_b_stays_to_the_bit() -> None:
    strategy = FedSALoRA(COHORT)
    state, updates = strategy.initial(), [arrived(client) for client in range(3)]
    aggregate = strategy.aggregate(state, updates)
    assert aggregate.start is not None
    assert state.start is not None
    for name, pair in aggregate.start.items():
        mean = sum(rows / 60 * u.adapter[name].a_RI.double() for rows, u in zip(ROWS, updates, strict=True))
        torch.testing.assert_close(pair.a_RI.double(), mean, rtol=1e-6, atol=1e-6)
        assert torch.equal(pair.b_OR, state.start[name].b_OR)


@pytest.mark.parametrize("client", range(3))
def test_every_client_matters(client: int) -> None:
    strategy = FedSALoRA(COHORT)
    updates = [arrived(other) for other in range(3)]
    before = strategy.aggregate(strategy.initial(), updates).start
    updates[client] = arrived(client, seed=100)
    after = strategy.aggregate(strategy.initial(), updates).start
    assert before is not None
    assert after is not None
    assert not any(torch.equal(before[name].a_RI, after[name].a_RI) for name in SHAPES)


def test_where_no_product_is_known_no_noise_is_reported() -> None:
    strategy = FedSALoRA(COHORT)
    aggregate = strategy.aggregate(strategy.initial(), [arrived(0), arrived(1)])
    assert aggregation_noise(aggregate.applied, aggregate.ideal) is None


def test_a_change_is_that_of_a_and_an_update_that_did_not_move_it_is_rejected() -> None:
    strategy = FedSALoRA(COHORT)
    state, work, update = strategy.initial(), strategy.client.work(1), arrived(0)
    assert state.start is not None
    sent = Broadcast(1, 0, 2, 2.0, News(), state.start)
    moved = [update.adapter[name].a_RI - state.start[name].a_RI for name in SHAPES]
    expected = float(torch.cat(moved).double().norm())
    assert check_update(update, sent, work, SHAPES, None) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UpdateError, match="expected the adapter to change"):
        check_update(replace(update, adapter=state.start), sent, work, SHAPES, None)


def test_a_clients_own_adapter_is_its_b_over_the_shared_a_at_its_rank() -> None:
    shared = Adapter({"q": Pair(torch.zeros(6, 3), torch.arange(15.0).reshape(3, 5))})
    b_OR = torch.ones(6, 2)
    own = own_adapters({4: Memory(own={"q.b": b_OR}), 5: Memory()}, shared)
    assert list(own) == [4]
    assert torch.equal(own[4]["q"].b_OR, b_OR)
    assert torch.equal(own[4]["q"].a_RI, shared["q"].a_RI[:2])


def test_a_client_that_keeps_both_factors_has_them_whatever_is_shared() -> None:
    kept = Adapter({"q": Pair(torch.ones(6, 2), torch.ones(2, 5))}).as_tensors(BOTH)
    (own,) = own_adapters({0: Memory(own=kept)}).values()
    assert torch.equal(own["q"].a_RI, kept["q.a"])
