"""One hostile client in ten moves an aggregate by no more than twice its share of the median change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom.federation.intake import Arrival, Intake
from fedloom.federation.robust import Robust, RobustRule, change_of, gram, judge
from fedloom.federation.rounds import RoundPlan
from fedloom.federation.server import ServerRules, broadcasts_for
from fedloom.federation.update_checks import Asked
from fedloom.lora.algebra import distance, norm, stack
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.client_half import Payload, Work
from fedloom.methods.fedex import FedEx
from fedloom.methods.ffa_lora import FFALoRA
from fedloom.methods.flexlora import FlexLoRA
from fedloom.methods.flora import FLoRA, Initialisation
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.state import Aggregate, Broadcast, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy, Weighting
from fedloom.methods.zero_padding import ZeroPadding, fedit
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"layers.0.q": (24, 20), "layers.1.v": (16, 20)}
NUM, HOSTILE, RANK = 10, 9, 2
COHORT = Cohort(SHAPES, RANK, lambda client: RANK, seed=1)
RULES = [Robust.CLIP, Robust.COSINE, Robust.KRUM, Robust.MEDIAN]
ASKED = Asked(10, 4, 80)


def drawn(seed: int, size: torch.Size) -> torch.Tensor:
    return torch.randn(size, generator=torch_stream(seed))


Attack = Callable[[Adapter, Adapter], dict[str, Pair]]
ATTACKS: dict[str, Attack] = {
    "sign flip": lambda u, s: {n: Pair(2 * s[n].b_OR - p.b_OR, p.a_RI) for n, p in u.items()},
    "sign flip and 50 x": lambda u, s: {n: Pair(s[n].b_OR - 50 * (p.b_OR - s[n].b_OR), p.a_RI) for n, p in u.items()},
    "90 x the norm": lambda u, s: {n: Pair(s[n].b_OR + 90 * (p.b_OR - s[n].b_OR), p.a_RI) for n, p in u.items()},
    "rescaled factors": lambda u, s: {n: Pair(50 * p.b_OR, p.a_RI / 50) for n, p in u.items()},
    "rescaled the other way": lambda u, s: {n: Pair(p.b_OR / 50, 50 * p.a_RI) for n, p in u.items()},
    "noise": lambda u, s: {n: Pair(drawn(1, p.b_OR.shape), drawn(2, p.a_RI.shape)) for n, p in u.items()},
}
METHODS: dict[str, Callable[[], Strategy]] = {
    "fedit": lambda: fedit(COHORT),
    "zero-padding by norm": lambda: ZeroPadding(COHORT, Weighting.NORM),
    "fedex-lora": lambda: FedEx(COHORT),
    "flexlora": lambda: FlexLoRA(COHORT),
    "ffa-lora": lambda: FFALoRA(COHORT),
    "flora": lambda: FLoRA(COHORT),
    "flora, shared draws": lambda: FLoRA(COHORT, initialisation=Initialisation.SHARED),
}
EXACT = ("fedex-lora", "flora", "flora, shared draws")
"""Methods whose aggregate is the mean of the products."""


def started(strategy: Strategy) -> ServerState:
    """Return a state some rounds in: both factors away from zero."""
    state = strategy.initial()
    if state.start is None:
        return state
    b = {f"{n}.b": torch.randn(p.b_OR.shape, generator=torch_stream(5, n)) * 0.3 for n, p in state.start.items()}
    return replace(state, start=state.start.with_factors(b))


def start_of(broadcast: Broadcast) -> Adapter:
    return broadcast.start.adapter(SHAPES, RANK, 1) if isinstance(broadcast.start, Draw) else broadcast.start


def honest(broadcast: Broadcast, trains: frozenset[str]) -> Update:
    """Move along a common direction with noise of the client's own."""
    moved = {}
    for name, pair in start_of(broadcast).items():
        common, own = torch_stream(3, name), torch_stream(4, name, broadcast.client)
        b, a = (
            0.1 * (torch.randn(t.shape, generator=common) + 0.3 * torch.randn(t.shape, generator=own))
            for t in (pair.b_OR, pair.a_RI)
        )
        moved[name] = Pair(pair.b_OR + b, pair.a_RI + 0.3 * a if "a" in trains else pair.a_RI)
    return Update(broadcast.round, broadcast.client, Adapter(moved), TrainingStats(10, 70, 30, 4, 2.0))


def aggregate(strategy: Strategy, rule: RobustRule, attack: Attack | None) -> tuple[Aggregate, Intake]:
    """Return the aggregate of nine honest clients, and with an attack of the tenth."""
    state = started(strategy)
    clients = list(range(NUM if attack else NUM - 1))
    broadcasts = broadcasts_for(state, clients, strategy, dict.fromkeys(clients, RANK), dict.fromkeys(clients, 2.0))
    work = strategy.client.work(1)
    updates = [honest(broadcast, work.trains) for broadcast in broadcasts]
    if attack:
        last = updates[HOSTILE]
        bad = last.adapter.with_factors(
            Adapter(attack(last.adapter, start_of(broadcasts[HOSTILE]))).as_tensors(work.sends)
        )
        updates[HOSTILE] = replace(last, adapter=bad)
    plan = RoundPlan(
        1, strategy, ServerRules(PlainStep()), lambda round: clients, SHAPES, {}, {}, lambda c: ASKED, robust=rule
    )
    intake = Intake(plan, work, state, broadcasts)
    arrivals = [Arrival(update, 0, 0) for update in updates]
    return strategy.aggregate(state, intake.usable(arrivals, lambda update: None)), intake


def median_norm(strategy: Strategy) -> float:
    state = started(strategy)
    clients = list(range(NUM - 1))
    broadcasts = broadcasts_for(state, clients, strategy, dict.fromkeys(clients, RANK), dict.fromkeys(clients, 2.0))
    work = strategy.client.work(1)
    return sorted(norm(change_of(honest(b, work.trains), b, work)) for b in broadcasts)[len(clients) // 2]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("method", METHODS)
def test_one_hostile_client_in_ten_moves_the_product_no_farther_than_the_page_states(
    method: str, attack: str, rule: Robust
) -> None:
    if (method, rule) == ("flora", Robust.COSINE):
        pytest.skip("changes of independent draws have no common direction: refused by the settings")
    strategy = METHODS[method]()
    clean, _ = aggregate(strategy, RobustRule(rule), None)
    attacked, intake = aggregate(strategy, RobustRule(rule), ATTACKS[attack])
    left_out = {client for client, record in intake.seen.items() if record.reason is not None}
    assert left_out <= {HOSTILE} or rule is Robust.KRUM
    moved, unit = distance(attacked.applied, clean.applied), median_norm(strategy)
    # Twice its share of a median change, which a mean of factors misses by their covariance.
    assert moved <= (2.0 if method in EXACT else 2.5) / NUM * unit * 1.1, (moved, unit)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_rule_one_client_has_the_power_that_the_page_states(method: str) -> None:
    """Up to ``max_norm_ratio`` times its share, which is what the rules take away."""
    strategy = METHODS[method]()
    clean, attacked = (aggregate(strategy, RobustRule(), a)[0] for a in (None, ATTACKS["90 x the norm"]))
    assert distance(attacked.applied, clean.applied) > 3.0 * median_norm(strategy)


@pytest.mark.parametrize("rule", [Robust.COSINE, Robust.KRUM])
def test_a_flipped_sign_is_left_out_with_its_reason(rule: Robust) -> None:
    _, intake = aggregate(fedit(COHORT), RobustRule(rule), ATTACKS["sign flip"])
    assert "server.robust" in str(intake.seen[HOSTILE].reason)


def test_the_geometric_median_gives_a_far_update_little_weight() -> None:
    found, _ = aggregate(fedit(COHORT), RobustRule(Robust.MEDIAN), ATTACKS["sign flip"])
    assert found.weights[HOSTILE] < 0.6 / NUM
    assert sum(found.weights.values()) == pytest.approx(1.0)


def test_honest_updates_below_the_median_are_used_as_they_are() -> None:
    strategy = fedit(COHORT)
    broadcasts = broadcasts_for(
        started(strategy), range(5), strategy, dict.fromkeys(range(5), RANK), dict.fromkeys(range(5), 2.0)
    )
    updates = [honest(broadcast, Work().trains) for broadcast in broadcasts]
    start, ended = start_of(broadcasts[0]).as_tensors(), updates[0].adapter.as_tensors()
    nearer = Adapter.from_tensors({key: (start[key] + ended[key]) / 2 for key in start})
    updates[0] = replace(updates[0], adapter=nearer)
    by_client = {broadcast.client: broadcast for broadcast in broadcasts}
    verdict = judge(RobustRule(Robust.CLIP), updates, by_client, Work(), lambda update: 1.0)
    norms = {u.client: norm(change_of(u, by_client[u.client], Work())) for u in updates}
    limit = sorted(norms.values())[2]
    for update in updates:
        after = norm(change_of(verdict.updates[update.client], by_client[update.client], Work()))
        assert after <= limit * (1 + 1e-6)
    assert verdict.updates[0] is updates[0]
    trusted = judge(RobustRule(Robust.CLIP), updates, by_client, Work(), lambda update: 1.0, trusted=range(5))
    assert all(trusted.updates[u.client] is u for u in updates)


def test_the_gram_matrix_is_that_of_the_dense_changes_at_any_ranks() -> None:
    ranks = {0: 3, 1: 1, 2: 2}
    strategy = ZeroPadding(Cohort(SHAPES, 3, ranks.__getitem__, seed=1))
    state = started(strategy)
    broadcasts = broadcasts_for(state, ranks, strategy, ranks, dict.fromkeys(ranks, 2.0))
    updates = [honest(broadcast, Work().trains) for broadcast in broadcasts]
    changes = [change_of(update, broadcast, Work()) for update, broadcast in zip(updates, broadcasts, strict=True)]
    dense = []
    for update, broadcast in zip(updates, broadcasts, strict=True):
        start: Any = broadcast.start
        moved = stack([update.adapter.to(torch.float64), start.to(torch.float64)], [1.0, -1.0])
        dense.append(torch.cat([pair.delta().flatten() for pair in moved.values()]))
    rows = torch.stack(dense)
    assert torch.allclose(gram(changes), rows @ rows.T, rtol=1e-9)


def test_gradients_of_different_ranks_are_compared_slot_by_slot() -> None:
    work = Work(payload=Payload.GRADIENT)
    shape = {"layer": (6, 5)}
    broadcasts, updates = {}, []
    for client, rank in enumerate((2, 3, 2)):
        pair = Pair(torch.ones(6, rank) * (1 + 9 * (client == 2)), torch.ones(rank, 5))
        updates.append(Update(1, client, Adapter({"layer": pair}), TrainingStats(1)))
        broadcasts[client] = Broadcast(1, client, rank, 2.0, news=None, start=Draw(("x",)))  # type: ignore[arg-type]
    assert shape["layer"] == updates[0].adapter["layer"].shape
    verdict = judge(RobustRule(Robust.CLIP), updates, broadcasts, work, lambda update: 1.0)
    norms = [norm(change_of(verdict.updates[c], broadcasts[c], work)) for c in range(3)]
    assert norms[2] == pytest.approx(norms[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_round_without_a_usable_update_has_nothing_to_judge(rule: Robust) -> None:
    assert judge(RobustRule(rule), [], {}, Work(), lambda update: 1.0).updates == {}
