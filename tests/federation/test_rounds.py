"""The round loop over a scripted engine: what is sent, what is refused, what the next state is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from fedloom.clients.held_sides import HeldSides
from fedloom.errors import TooFewClientsError
from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import decode_broadcast, encode_broadcast
from fedloom.federation.intake import Arrival
from fedloom.federation.messages import decode_answer, encode_update, numbers_of
from fedloom.federation.rounds import RoundPlan, RoundRecord, run_rounds
from fedloom.federation.sampling import sample_clients
from fedloom.federation.server import BroadcastForm, ServerRules, news_for
from fedloom.federation.update_checks import Asked
from fedloom.lora.algebra import distance, norm, stack
from fedloom.lora.initial import Draw, fresh_adapter
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.client_half import Work
from fedloom.methods.flora import FLoRA
from fedloom.methods.server_steps import FedExPStep, MomentumStep, PlainStep
from fedloom.methods.side import digest
from fedloom.methods.state import Broadcast, Failure, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.methods.zero_padding import ZeroPadding, fedit
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

SHAPES = {"layers.0.q": (12, 10), "layers.1.v": (8, 10)}
RANKS = {0: 3, 1: 2, 2: 1}
COHORT = Cohort(SHAPES, 3, RANKS.__getitem__, seed=1)


class ScriptedEngine:
    """Moves every client by a small random step of its own; ``faults`` replaces what a client returns."""

    def __init__(self, faults: dict[tuple[int, int], object] | None = None) -> None:
        self.faults, self.sent = faults or {}, list[Broadcast]()

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        for broadcast in broadcasts:
            self.sent.append(broadcast)
            update = self.trained(broadcast)
            fault = self.faults.get((broadcast.round, broadcast.client), lambda u: u)
            outcome = fault(update)  # type: ignore[operator]
            if outcome is not None:
                yield Arrival(outcome, 100, 200)

    def trained(self, broadcast: Broadcast) -> Update:
        start = broadcast.start
        if isinstance(start, Draw):
            start = start.adapter(SHAPES, broadcast.rank, 1)
        generator = torch_stream(7, broadcast.round, broadcast.client)
        moved = {n: Pair(p.b_OR + torch.randn(p.b_OR.shape, generator=generator) / 9, p.a_RI) for n, p in start.items()}
        stats = TrainingStats(10 + broadcast.client, 70, 30, 4, 2.0, 1.5, 0.1)
        return Update(broadcast.round, broadcast.client, Adapter(moved), stats, broadcast.news.version)


def plan(strategy: Strategy, **changes: object) -> RoundPlan:
    defaults = RoundPlan(
        num_rounds=3,
        strategy=strategy,
        rules=ServerRules(PlainStep()),
        sample=lambda round: [0, 1, 2],
        shapes=SHAPES,
        ranks=RANKS,
        scales=dict.fromkeys(RANKS, 2.0),
        asked=lambda client: Asked(10 + client, 4, 4 * 20),
    )
    return replace(defaults, **changes)  # type: ignore[arg-type]


def run(
    the_plan: RoundPlan, engine: ScriptedEngine | None = None, state: ServerState | None = None
) -> list[RoundRecord]:
    start = state or the_plan.strategy.initial()
    return list(run_rounds(start, the_plan, engine or ScriptedEngine(), lambda state: {"round": state.round}))


def test_floras_global_adapter_is_the_sum_of_all_rounds_weighted_means_on_an_untouched_base() -> None:
    engine = ScriptedEngine()
    records = run(plan(FLoRA(COHORT)), engine)
    updates = [engine.trained(broadcast) for broadcast in engine.sent]
    total = sum(10 + k for k in RANKS)
    expected = stack([u.adapter for u in updates], [u.stats.num_rows / total for u in updates])
    assert distance(records[-1].state.global_adapter(), expected) < 1e-5 * norm(expected)
    assert all(record.figures.aggregation_noise == pytest.approx(0.0, abs=1e-6) for record in records)


def test_the_loop_stops_anywhere_and_goes_on_to_the_same_state() -> None:
    whole, first = run(plan(FLoRA(COHORT))), run(plan(FLoRA(COHORT), num_rounds=1))
    rest = run(plan(FLoRA(COHORT)), state=first[-1].state)
    ours, theirs = (records[-1].state.side.as_tensors() for records in (whole, rest))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [record.round for record in rest] == [2, 3]


def test_the_last_round_is_always_evaluated() -> None:
    records = run(plan(FLoRA(COHORT), evaluate_every=0))
    assert [record.evaluation for record in records] == [None, None, {"round": 3}]


def answer_of(blob: bytes, broadcast: Broadcast, dtype: WireDtype = WireDtype.FP32) -> Update | Failure:
    return decode_answer(blob, broadcast, Work(), SHAPES, dtype, lambda draw: draw.adapter(SHAPES, broadcast.rank, 1))


FAULTS = {
    "returned nothing": lambda update: None,
    "out of memory": lambda update: Failure(update.client, "out of memory"),
    "finite": lambda update: replace(update, adapter=update.adapter.scaled(math.nan)),
    "lacks module": lambda update: replace(update, adapter=Adapter({"layers.0.q": update.adapter["layers.0.q"]})),
    "expected rank 2": lambda update: replace(update, adapter=fresh_adapter(SHAPES, 1, 1)),
    "expected the adapter to change": lambda update: replace(update, adapter=fresh_adapter(SHAPES, 2, 1)),
    "expected a change of norm": lambda update: replace(update, adapter=update.adapter.scaled(1e6)),
    "update for round 2": lambda update: replace(update, round=1),
    "at least one row": lambda update: replace(update, stats=replace(update.stats, num_rows=0)),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_an_unusable_update_is_left_out_with_its_reason_and_the_round_goes_on(reason: str) -> None:
    records = run(plan(FLoRA(COHORT)), ScriptedEngine({(2, 1): FAULTS[reason]}))
    left_out = records[1].clients[1]
    assert left_out.reason is not None
    assert reason in left_out.reason
    assert [c.weight for c in records[1].clients] == pytest.approx([10 / 22, 0.0, 12 / 22])
    assert math.isfinite(records[-1].figures.change_norm)


def test_too_few_usable_updates_end_the_run_with_every_reason() -> None:
    engine = ScriptedEngine({(2, k): FAULTS["out of memory"] for k in (0, 1)})
    with pytest.raises(TooFewClientsError, match=r"at least 2 clients .* got 1 .*client 0: out of memory; client 1"):
        run(plan(FLoRA(COHORT), min_clients=2), engine)


def test_an_uninvited_or_repeated_update_changes_nothing() -> None:
    class Chatty(ScriptedEngine):
        def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
            for arrival in super().train(broadcasts):
                yield arrival
                yield arrival
                assert isinstance(arrival.outcome, Update)
                yield replace(arrival, outcome=replace(arrival.outcome, client=99))

    assert run(plan(FLoRA(COHORT)), Chatty())[-1].figures == run(plan(FLoRA(COHORT)))[-1].figures


# ---- what is sent ------------------------------------------------------------------------------------------------


def test_a_client_that_missed_rounds_receives_the_news_that_bring_it_to_the_present_side() -> None:
    engine = ScriptedEngine()
    sample = {1: [0, 1], 2: [0, 1], 3: [0, 2], 4: [0, 1, 2]}
    run(plan(FLoRA(COHORT), num_rounds=4, sample=sample.__getitem__), engine)
    stores = {client: HeldSides() for client in RANKS}
    versions = dict.fromkeys(RANKS, 0)
    for broadcast in engine.sent:
        side = stores[broadcast.client].caught_up(versions[broadcast.client], broadcast.news)
        assert digest(side) == broadcast.news.sha256
        versions[broadcast.client] = broadcast.news.version
    assert {b.news.since for b in engine.sent if b.client == 2} == {0, 2}
    assert {b.news.since for b in engine.sent if b.client == 0} == {0, 1, 2}


def test_a_version_counts_as_held_only_when_its_client_says_so() -> None:
    lost = {(2, 0): lambda update: None, (2, 1): lambda update: Failure(1, "out of memory", held=1)}
    engine = ScriptedEngine(lost)  # type: ignore[arg-type]
    state = run(plan(FLoRA(COHORT), num_rounds=2), engine)[-1].state
    assert state.seen == {0: 0, 1: 1, 2: 1}
    boast = {(2, 0): lambda update: replace(update, held=99)}
    assert run(plan(FLoRA(COHORT), num_rounds=2), ScriptedEngine(boast))[-1].state.seen[0] == 0  # type: ignore[arg-type]


def test_news_are_never_dearer_than_the_whole_side() -> None:
    records = run(plan(FLoRA(COHORT), num_rounds=8))
    state = records[-1].state
    for version in range(1, 9):
        assert sum(part.num_bytes for part in news_for(state, version, "").parts) <= state.side.num_bytes
    assert len(state.chain) < 8


def test_a_lossless_compressed_broadcast_gives_floras_model_at_fewer_bytes() -> None:
    cohort = Cohort(SHAPES, 8, lambda client: 8, seed=1)
    plans = [
        plan(FLoRA(cohort), rules=ServerRules(PlainStep(), form), ranks=dict.fromkeys(RANKS, 8))
        for form in (BroadcastForm.STACK, BroadcastForm.COMPRESSED)
    ]
    stacked, compressed = (run(p) for p in plans)
    assert distance(stacked[-1].state.side, compressed[-1].state.side) < 1e-6 * norm(stacked[-1].state.side)
    assert compressed[0].state.chain[-1].num_bytes < stacked[0].state.chain[-1].num_bytes


def test_what_a_lossy_broadcast_holds_back_is_sent_later() -> None:
    rules = ServerRules(PlainStep(), BroadcastForm.COMPRESSED, tolerance=0.3)
    lossy, exact = run(plan(FLoRA(COHORT), rules=rules))[-1].state, run(plan(FLoRA(COHORT)))[-1].state
    delivered = stack([lossy.side, lossy.residual], [1.0, 1.0])
    assert norm(lossy.residual) > 0.1 * norm(exact.side)
    assert distance(delivered, exact.side) < 1e-4 * norm(exact.side)


def test_the_server_adopts_what_a_16_bit_wire_lets_the_clients_see() -> None:
    rules = ServerRules(PlainStep(), wire=WireDtype.BF16)
    state = run(plan(ZeroPadding(COHORT), rules=rules))[-1].state
    assert state.start is not None
    assert all(torch.equal(t, t.bfloat16().float()) for t in state.start.as_tensors().values())


# ---- server steps ------------------------------------------------------------------------------------------------


def test_a_server_learning_rate_scales_the_change_for_every_strategy() -> None:
    for strategy in (FLoRA(COHORT), ZeroPadding(COHORT)):
        plain = run(plan(strategy, num_rounds=1))[0].state.global_adapter()
        doubled = run(plan(strategy, num_rounds=1, rules=ServerRules(PlainStep(2.0))))[0].state.global_adapter()
        start = strategy.initial().start
        moved = plain if start is None else stack([plain, start], [1.0, -1.0])
        expected = stack([plain, moved], [1.0, 1.0])
        assert distance(doubled, expected) < 1e-5 * norm(expected)


def test_a_server_learning_rate_does_not_grow_the_stack() -> None:
    plain, scaled = (run(plan(FLoRA(COHORT), num_rounds=1, rules=ServerRules(PlainStep(r))))[0] for r in (1.0, 1.7))
    assert scaled.state.chain[0].ranks == plain.state.chain[0].ranks


def test_momentum_is_the_dense_heavy_ball_on_the_product() -> None:
    plain = run(plan(FLoRA(COHORT)))
    moved = run(plan(FLoRA(COHORT), rules=ServerRules(MomentumStep(1.5, 0.5))))
    velocity, total = 0.0, 0.0
    for before, after in zip([ServerState(), *(r.state for r in plain)], [r.state for r in plain], strict=False):
        change = after.side["layers.0.q"].delta() - (before.side["layers.0.q"].delta() if before.side else 0.0)
        velocity = 0.5 * velocity + change
        total = total + 1.5 * velocity
    assert torch.allclose(moved[-1].state.side["layers.0.q"].delta(), total, atol=1e-5)  # type: ignore[arg-type]


def test_fedexp_steps_further_where_clients_disagree_and_never_past_its_cap() -> None:
    steps = {
        cap: run(plan(FLoRA(COHORT), num_rounds=1, rules=ServerRules(FedExPStep(cap=cap))))[0]
        for cap in (1.0, 1.3, 9.0)
    }
    lengths = [norm(record.state.side) for record in steps.values()]
    engine = ScriptedEngine()
    plain = run(plan(FLoRA(COHORT), num_rounds=1), engine)[0]
    shares = [u.stats.num_rows / 33 for u in map(engine.trained, engine.sent)]
    squares = sum(s * norm(u.adapter) ** 2 for s, u in zip(shares, map(engine.trained, engine.sent), strict=True))
    expected = max(1.0, squares / (2 * norm(plain.state.side) ** 2))
    assert lengths == pytest.approx([norm(plain.state.side) * r for r in (1.0, min(1.3, expected), expected)], rel=1e-5)


# ---- messages and sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [one for one in WireDtype if not one.is_coded])
def test_messages_arrive_as_sent_up_to_the_wires_dtype(dtype: WireDtype) -> None:
    engine = ScriptedEngine()
    run(plan(ZeroPadding(COHORT), num_rounds=1), engine)
    broadcast = engine.sent[0]
    update = engine.trained(broadcast)
    back = answer_of(encode_update(update, update.adapter.as_tensors(), dtype), broadcast, dtype)
    assert isinstance(back, Update)
    assert numbers_of(back) == numbers_of(update)
    assert distance(back.adapter, update.adapter) < 1e-2 * norm(update.adapter)
    received = decode_broadcast(encode_broadcast(broadcast, dtype), SHAPES)
    assert (received.round, received.rank, received.news.since, received.draw) == (1, 3, 0, None)
    assert isinstance(broadcast.start, Adapter)
    arrived, expected = received.sent, broadcast.start.to(dtype.torch).to(torch.float32).as_tensors()
    assert all(torch.equal(arrived[key], expected[key]) for key in expected)


def test_a_torn_message_is_refused() -> None:
    engine = ScriptedEngine()
    run(plan(fedit(COHORT), num_rounds=1), engine)
    broadcast = engine.sent[0]
    update = engine.trained(broadcast)
    blob = encode_update(update, update.adapter.as_tensors(), WireDtype.FP32)
    assert isinstance(answer_of(blob, broadcast), Update)
    torn = answer_of(blob[:-3], broadcast)
    assert isinstance(torn, Failure)
    assert "whole message" in torn.reason


def test_sampling_is_a_function_of_seed_and_round_alone() -> None:
    drawn = sample_clients(3, 5, 100_000, 10)
    assert drawn == sample_clients(3, 5, 100_000, 10) == sorted(set(drawn))
    assert drawn != sample_clients(4, 5, 100_000, 10)
    assert drawn != sample_clients(3, 6, 100_000, 10)
    assert sample_clients(3, 5, 4, 4) == [0, 1, 2, 3]
