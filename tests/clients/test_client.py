"""A client in bytes: it catches up with what it missed, keeps what is its own, and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle

import pytest
import torch
from torch import Tensor

from fedloom.clients.client import Assignment, Client
from fedloom.clients.held_sides import VERSIONS_KEPT, HeldSides
from fedloom.clients.memory import decode_memories, encode_memories
from fedloom.data.tokens import TokenSet
from fedloom.errors import BehindError, ModelError
from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import as_sent, encode_broadcast
from fedloom.federation.coding import rounded
from fedloom.federation.intake import Arrival
from fedloom.federation.messages import decode_answer
from fedloom.federation.rounds import RoundPlan, RoundRecord, run_rounds
from fedloom.federation.server import BroadcastForm, ServerRules, broadcasts_for, news_for
from fedloom.federation.update_checks import Asked
from fedloom.lora.algebra import distance, slots_after, total, truncate
from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter, Factors, Pair
from fedloom.methods import table
from fedloom.methods.client_half import ClientHalf, EveryRound, InFewBits, Moments, Payload, Rounding, Work
from fedloom.methods.options import MethodOptions
from fedloom.methods.server_steps import MomentumStep, PlainStep, ServerStep
from fedloom.methods.side import digest, grown
from fedloom.methods.state import Aggregate, Broadcast, Failure, News, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.methods.sums import FactorSum
from fedloom.methods.zero_padding import ZeroPadding
from fedloom.seeding import torch_stream
from fedloom.training.cohort_round import ClientResult
from fedloom.training.stats import TrainingStats

SHAPES = {"layers.0.q": (40, 30), "layers.1.v": (24, 30)}
RANKS = {0: 3, 1: 2, 2: 1}
Setup = tuple[Strategy, ServerRules]
COHORT = Cohort(SHAPES, 3, RANKS.__getitem__, seed=1)
NO_ROWS = TokenSet.from_rows([])


def moved(assignment: Assignment) -> ClientResult:
    """Train by adding noise that depends on round and client alone to the factors that are trained."""
    task, generator = assignment.task, torch_stream(7, assignment.round, assignment.task.client)
    tensors = task.start.as_tensors(task.trains)
    changed = {key: t + torch.randn(t.shape, generator=generator) / 9 for key, t in tensors.items()}
    adapter = task.start.with_factors(changed)
    return ClientResult(
        client=task.client,
        adapter=adapter,
        stats=TrainingStats(10, 70, 30, 4, 2.0, 1.5, 0.1),
        num_examples_seen=4,
        optimiser_state={"layers.0.q.a_RI.step": torch.tensor(float(assignment.round))} if task.keeps_moments else None,
        gradient=adapter,
        moments=second_moments(task.rank, task.trains, generator) if task.shares_moments else {},
    )


def second_moments(rank: int, trains: Factors, generator: torch.Generator) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (num_out, num_in) in SHAPES.items():
        for factor in sorted(trains):
            length = num_in if factor == "a" else num_out
            found[f"{name}.{factor}.rows"] = torch.rand(rank, generator=generator)
            found[f"{name}.{factor}.columns"] = torch.rand(length, generator=generator)
    return found


@dataclass
class Separate:
    """An engine whose clients share nothing but bytes with the server, nor with each other."""

    half: ClientHalf
    wire: WireDtype
    fails: Callable[[Assignment], bool] = lambda assignment: False
    clients: dict[int, Client] = field(default_factory=dict)
    seen: list[Assignment] = field(default_factory=list)

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        for sent in broadcasts:
            client = self.clients.setdefault(
                sent.client,
                Client(sent.client, self.half, SHAPES, 1, lambda: NO_ROWS, HeldSides()),
            )
            blob = client.handle(encode_broadcast(sent, self.wire), self.trained, self.wire)
            work = self.half.work(sent.round)
            rank = sent.rank
            outcome = decode_answer(blob, sent, work, SHAPES, self.wire, lambda d, r=rank: d.adapter(SHAPES, r, 1))  # type: ignore[misc]
            yield Arrival(outcome, 0, len(blob))

    def trained(self, assignment: Assignment) -> ClientResult:
        self.seen.append(assignment)
        if self.fails(assignment):
            raise ModelError("expected a model that trains, got none; load one")
        return moved(assignment)


def plan_of(strategy: Strategy, rules: ServerRules, sample: Callable[[int], list[int]], num_rounds: int) -> RoundPlan:
    scales, asked = dict.fromkeys(RANKS, 2.0), lambda client: Asked(10, 4, 80)
    return RoundPlan(num_rounds, strategy, rules, sample, SHAPES, RANKS, scales, asked, max_norm_ratio=1e9)


def run(
    strategy: Strategy,
    rules: ServerRules,
    sample: Callable[[int], list[int]],
    num_rounds: int,
    fails: Callable[[Assignment], bool] = lambda assignment: False,
) -> tuple[Separate, list[RoundRecord]]:
    engine = Separate(strategy.client, rules.wire, fails)
    plan = plan_of(strategy, rules, sample, num_rounds)
    return engine, list(run_rounds(strategy.initial(), plan, engine, lambda state: {}))


@dataclass(frozen=True)
class TrainsB(ZeroPadding):
    """Zero-padding whose clients train and send ``b`` alone; ``a`` is drawn by everybody and never crosses."""

    @property
    def client(self) -> ClientHalf:
        return EveryRound(Work(frozenset("b"), frozenset("b")))

    @property
    def origin(self) -> Draw:
        return Draw(("global",), self.cohort.max_rank)

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        mean = super().finish(state, sums)
        assert mean.start is not None
        assert state.start is not None
        return replace(mean, start=state.start.with_factors(mean.start.as_tensors(frozenset("b"))))


def same(left: Adapter, right: Adapter, factors: Factors = BOTH) -> bool:
    one, other = left.as_tensors(factors), right.as_tensors(factors)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def made(name: str, form: BroadcastForm = BroadcastForm.STACK, step: ServerStep | None = None) -> Setup:
    return table.make(name, COHORT), ServerRules(
        step or PlainStep(), form, 0.1 if form is not BroadcastForm.STACK else 0.0
    )


def with_moments(name: str, moments: str) -> Setup:
    return table.make(name, COHORT, MethodOptions(moments=moments)), ServerRules(PlainStep())


def with_gradient_start(name: str, wire: WireDtype = WireDtype.FP32) -> Setup:
    options = MethodOptions(initialisation="gradient", few_bits=wire.is_coded)
    tolerance = 0.05 if wire.is_coded else 0.0
    form = BroadcastForm.COMPRESSED if wire.is_coded else BroadcastForm.STACK
    return table.make(name, COHORT, options), ServerRules(MomentumStep(1.2), form, tolerance, wire)


METHODS: dict[str, Callable[[], Setup]] = {
    **{name: partial(made, name) for name in table.shipped("aggregates")},
    **{
        f"{name} with momentum": partial(made, name, step=MomentumStep(1.2))
        for name in table.shipped("takes_server_steps")
    },
    **{f"{name}, compressed": partial(made, name, BroadcastForm.COMPRESSED) for name in table.shipped("grows_side")},
    **{
        f"{name} with {moments} moments": partial(with_moments, name, moments)
        for name in table.shipped("continues")
        for moments in ("own", "shared")
    },
    **{f"{name} from the gradient": partial(with_gradient_start, name) for name in table.shipped("continues")},
    "b alone": lambda: (TrainsB(COHORT), ServerRules(PlainStep())),
}


CODED = [wire for wire in WireDtype if wire.is_coded]
UNCODED = [wire for wire in WireDtype if not wire.is_coded]
ABSENCES = {2: [0, 1], 3: [0], 4: [0, 1], 5: [0], 6: [0, 1], 7: [0]}


def in_turn(names: Iterable[str], wires: Sequence[WireDtype]) -> list[tuple[str, WireDtype]]:
    """Return every method with one of the wires, and every wire once at least."""
    names = list(names)
    return list(zip(names, cycle(wires), strict=False)) + [(names[0], wire) for wire in wires[len(names) :]]


def in_few_bits(name: str, wire: WireDtype) -> Setup:
    strategy = table.make(name, COHORT, MethodOptions(few_bits=True))
    return strategy, ServerRules(PlainStep(), BroadcastForm.COMPRESSED, 0.05, wire)


@pytest.mark.parametrize(("name", "wire"), in_turn(table.shipped("aggregates"), CODED))
def test_in_few_bits_a_client_holds_what_the_server_knows_it_to_hold_whatever_it_missed(
    name: str, wire: WireDtype
) -> None:
    strategy, rules = in_few_bits(name, wire)
    engine, records = run(strategy, rules, lambda n: ABSENCES.get(n, [0, 1, 2]), 8)
    assert not [c.reason for record in records for c in record.clients if c.reason]
    before, state = records[-2].state, records[-1].state
    for assignment in engine.seen[-3:]:
        client = assignment.task.client
        start = strategy.start_for(before, client)
        if isinstance(start, Draw):
            assert client not in state.views
            assert same(assignment.side, before.side)
            continue
        held = state.views[client]
        assert same(assignment.task.start, truncate(held, RANKS[client]), BOTH - strategy.client.work(8).keeps)
        beyond = slots_after(held, RANKS[client])
        assert same(assignment.side, total([before.side, beyond]) if beyond else before.side)
        first = strategy.start_for(strategy.initial(), client)
        assert isinstance(first, Adapter)
        if not table.traits_of(name).averages_factors:
            continue  # a new decomposition every round moves the factors far, whatever the product does
        assert distance(held, start) <= {8: 0.03, 4: 0.4, 2: 1.5}[wire.bits] * distance(start, first)


@pytest.mark.parametrize(("name", "wire"), in_turn(table.shipped("continues"), CODED))
def test_in_few_bits_every_client_comes_to_hold_the_start_from_the_gradient(name: str, wire: WireDtype) -> None:
    strategy, rules = with_gradient_start(name, wire)
    engine, records = run(strategy, rules, lambda n: ABSENCES.get(n, [0, 1, 2]), 8)
    assert not [c.reason for record in records for c in record.clients if c.reason]
    before, state = records[-2].state, records[-1].state
    assert before.start is not None
    drawn = strategy.initial().start
    assert drawn is not None
    for assignment in engine.seen[-3:]:
        client = assignment.task.client
        held = state.views[client]
        assert same(assignment.task.start, truncate(held, RANKS[client]), BOTH - strategy.client.work(8).keeps)
    newest = truncate(state.views[0], 1), truncate(before.start, 1), truncate(drawn, 1)
    for name_of, pair in newest[0].items():  # the one that was there every time
        off, way = pair.a_RI - newest[1][name_of].a_RI, newest[2][name_of].a_RI - newest[1][name_of].a_RI
        assert float(off.norm()) <= {8: 0.03, 4: 0.4, 2: 1.0}[wire.bits] * float(way.norm())


@pytest.mark.parametrize("wire", CODED)
def test_in_few_bits_a_client_that_failed_or_holds_another_start_is_sent_the_way_from_the_first_one(
    wire: WireDtype,
) -> None:
    strategy, rules = in_few_bits("zero-padding", wire)
    engine = Separate(strategy.client, wire, lambda assignment: (assignment.round, assignment.task.client) == (2, 1))
    plans = [plan_of(strategy, rules, lambda n: [0, 1, 2], num_rounds) for num_rounds in (4, 6)]
    records = list(run_rounds(strategy.initial(), plans[0], engine, lambda s: {}))
    assert [1 in record.state.views for record in records] == [True, False, True, True]
    assert [record.clients[1].reason is None for record in records] == [True, False, True, True]
    engine.clients[1].memory = replace(engine.clients[1].memory, start=engine.clients[0].memory.start)
    more = list(run_rounds(records[-1].state, plans[1], engine, lambda s: {}))
    assert "another" in str(more[0].clients[1].reason) or "hash" in str(more[0].clients[1].reason)
    assert more[1].clients[1].reason is None


@pytest.mark.parametrize("wire", CODED)
@pytest.mark.parametrize("payload", [Payload.CHANGE, Payload.GRADIENT])
def test_in_few_bits_what_a_client_says_over_its_rounds_is_what_it_meant_less_what_it_still_owes(
    wire: WireDtype, payload: Payload
) -> None:
    half = InFewBits(EveryRound(Work(payload=payload)), owes=True)
    client = Client(0, half, SHAPES, 1, lambda: NO_ROWS, HeldSides())
    meant, said = dict[str, Tensor](), dict[str, Tensor]()
    for round in range(1, 7):
        drawn = Draw(("global",), 3)
        assignment = client.prepare(as_sent(Broadcast(round, 0, 3, 2.0, News(), drawn)))
        result = moved(assignment)
        _, tensors = client.conclude(assignment, result, wire)
        sent = rounded(tensors, wire)
        start = assignment.task.start.as_tensors()
        for key, tensor in result.adapter.as_tensors().items():
            own = tensor - start[key] if payload is Payload.CHANGE else tensor
            meant[key], said[key] = meant.get(key, 0.0) + own.double(), said.get(key, 0.0) + sent[key].double()
    for key, tensor in meant.items():
        assert torch.allclose(said[key] + client.memory.owed[key].double(), tensor, atol=1e-5)
        assert float(client.memory.owed[key].abs().max()) > 1e-4


def test_shared_moments_are_the_mean_over_those_that_have_a_slot_and_reach_every_client_with_its_own_move() -> None:
    strategy, rules = with_moments("zero-padding", "shared")
    engine, records = run(strategy, rules, lambda n: {2: [0, 1], 3: [0]}.get(n, [0, 1, 2]), 4)
    assert not [c.reason for record in records for c in record.clients if c.reason]
    first, last = [a.task for a in engine.seen[:3]], {a.task.client: a.task for a in engine.seen[-3:]}
    assert [task.prior for task in first] == [None] * 3
    said = [second_moments(t.rank, BOTH, torch_stream(7, 1, t.client)) for t in first]
    kept = records[0].state.optimiser["layers.0.q.a.rows"]
    assert len(kept) == 3
    for task in last.values():
        assert task.prior is not None
        assert task.prior.num_steps == 2
        assert len(task.prior.second["layers.0.q.a.rows"]) == task.rank
        missed = {0: 1, 1: 2, 2: 3}[task.client]
        before = strategy.start_for(records[3 - missed - 1].state if missed < 3 else strategy.initial(), task.client)
        assert isinstance(before, Adapter)
        assert task.prior.move is not None
        moved_a = (task.start["layers.0.q"].a_RI - before["layers.0.q"].a_RI) / missed
        assert torch.allclose(task.prior.move["layers.0.q"].a_RI, moved_a, atol=1e-6)
    assert said[0].keys() == records[0].state.optimiser.keys()


@pytest.mark.parametrize(("name", "wire"), in_turn(METHODS, UNCODED))
def test_a_client_that_missed_rounds_ends_bit_equal_to_one_that_did_not(name: str, wire: WireDtype) -> None:
    strategy, rules = METHODS[name]()
    engine, records = run(strategy, replace(rules, wire=wire), lambda n: ABSENCES.get(n, [0, 1, 2]), 8)
    assert not [c.reason for record in records for c in record.clients if c.reason]
    last = {a.task.client: a for a in engine.seen[-3:]}
    state = records[-2].state
    for client, rank in RANKS.items():
        start = strategy.start_for(state, client)
        wanted = start.adapter(SHAPES, rank, 1) if isinstance(start, Draw) else start
        beyond = slots_after(wanted, rank)
        assert same(last[client].side, total([state.side, beyond]) if beyond else state.side)
        shared = BOTH - strategy.client.work(8).keeps
        assert same(last[client].task.start, truncate(wanted, rank), shared)


def test_that_law_covers_parts_the_whole_and_a_compacted_side() -> None:
    strategy, rules = METHODS["flora"]()
    _, records = run(strategy, rules, lambda n: [0, 1, 2], 8)
    kinds = {news_for(r.state, version, "").is_whole for r in records for version in range(1, r.round)}
    assert kinds == {True, False}
    assert sum(RANKS.values()) * 8 > records[-1].state.side["layers.1.v"].rank == 24


def test_a_factor_that_nobody_trained_never_crosses() -> None:
    strategy, rules = METHODS["b alone"]()
    engine, _ = run(strategy, rules, lambda n: [0, 1, 2], 3)
    start = strategy.initial().start
    assert start is not None
    sizes = [len(encode_broadcast(b, rules.wire)) for b in first_broadcasts(strategy)]
    assert len(set(sizes)) == 1
    for assignment in engine.seen:
        rank = assignment.task.rank
        assert all(torch.equal(assignment.task.start[n].a_RI, start[n].a_RI[:rank]) for n in SHAPES)


def first_broadcasts(strategy: Strategy) -> list[Broadcast]:
    return broadcasts_for(strategy.initial(), RANKS, strategy, RANKS, dict.fromkeys(RANKS, 2.0))


def test_a_client_that_lost_its_side_says_so_and_is_sent_the_whole() -> None:
    strategy, rules = METHODS["flora"]()
    engine = Separate(strategy.client, rules.wire)
    plan = plan_of(strategy, rules, lambda n: [0, 1, 2], 4)
    reasons = []
    for record in run_rounds(strategy.initial(), plan, engine, lambda state: {}):
        reasons.append(record.clients[1].reason)
        if record.round == 2:
            client = engine.clients[1]
            client.sides, client.memory = HeldSides(), replace(client.memory, version=0)
    assert [reason is None for reason in reasons] == [True, True, False, True]
    assert "it holds version 0" in str(reasons[2])


def test_a_side_that_differs_from_the_servers_is_not_trained_on() -> None:
    news = News(0, 1, (random_adapter(1),), False, digest(random_adapter(2)))
    with pytest.raises(BehindError, match="hash"):
        HeldSides().caught_up(0, news)


def test_the_number_of_sides_held_does_not_grow_with_the_rounds() -> None:
    held, side = HeldSides(), Adapter()
    for version in range(1, 4 * VERSIONS_KEPT):
        part = random_adapter(version)
        side = grown(side, part)
        held.caught_up(version - 1, News(version - 1, version, (part,), False, digest(side)))
    assert len(held._sides) == VERSIONS_KEPT


def random_adapter(seed: int, rank: int = 2) -> Adapter:
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=torch_stream(seed, *size))

    return Adapter({name: Pair(draw(o, rank), draw(rank, i)) for name, (o, i) in SHAPES.items()})


# ---- what is sent and kept -----------------------------------------------------------------------------------------


def client_of(work: Work) -> Client:
    return Client(0, EveryRound(work), SHAPES, 1, lambda: NO_ROWS, HeldSides())


def answered(client: Client, work: Work, round: int, start: Adapter, wire: WireDtype = WireDtype.FP32) -> Update:
    sent = Broadcast(round, 0, 2, 2.0, News(), start)
    blob = client.handle(encode_broadcast(sent, wire), moved, wire)
    outcome = decode_answer(blob, sent, work, SHAPES, wire, lambda draw: draw.adapter(SHAPES, 2, 1))
    assert isinstance(outcome, Update), outcome
    return outcome


def test_a_change_arrives_as_the_factors_it_leads_to() -> None:
    factors, change = Work(), Work(payload=Payload.CHANGE)
    start = random_adapter(3)
    by_factors = answered(client_of(factors), factors, 1, start).adapter.as_tensors()
    by_change = answered(client_of(change), change, 1, start).adapter.as_tensors()
    assert all(torch.allclose(by_factors[key], by_change[key], atol=1e-6) for key in by_factors)


def test_a_gradient_that_does_not_cross_is_zero_at_the_server() -> None:
    work = Work(frozenset("b"), frozenset("b"), Payload.GRADIENT)
    received = answered(client_of(work), work, 1, random_adapter(3)).adapter
    assert all(float(pair.a_RI.abs().max()) == 0.0 < float(pair.b_OR.abs().max()) for pair in received.values())


def delivered(work: Work, wire: WireDtype) -> dict[str, torch.Tensor]:
    """Return the sum of eight rounds' changes as the server receives them, from one start."""
    client, start = client_of(work), random_adapter(3).to(torch.bfloat16).to(torch.float32)
    before, total = start.as_tensors(), {key: torch.zeros(t.shape) for key, t in start.as_tensors().items()}
    for round in range(1, 9):
        for key, tensor in answered(client, work, round, start, wire).adapter.as_tensors().items():
            total[key] += tensor - before[key]
    return total


def test_what_the_wire_rounds_off_is_owed_and_sent_later() -> None:
    dropping, owing = Work(payload=Payload.CHANGE), Work(payload=Payload.CHANGE, rounding=Rounding.OWED)
    exact = delivered(dropping, WireDtype.FP32)
    off = [
        sum(float((tensor - exact[key]).norm()) for key, tensor in delivered(work, WireDtype.BF16).items())
        for work in (dropping, owing)
    ]
    assert off[1] < 0.7 * off[0]


def test_own_factors_and_moments_go_on_at_the_client_and_survive_as_bytes() -> None:
    work = Work(sends=frozenset("a"), keeps=frozenset("b"), moments=Moments.OWN)
    client, start = client_of(work), random_adapter(3)
    answered(client, work, 1, start)
    own = dict(client.memory.own)
    assert {key.rpartition(".")[2] for key in own} == {"b"}
    blob = encode_memories({0: client.memory})
    assert blob is not None
    back = client_of(work)
    back.memory = replace(decode_memories(blob)[0], version=client.memory.version)
    seen: list[Assignment] = []

    def train(assignment: Assignment) -> ClientResult:
        seen.append(assignment)
        return moved(assignment)

    back.handle(encode_broadcast(Broadcast(2, 0, 2, 2.0, News(), start), WireDtype.FP32), train, WireDtype.FP32)
    begun = seen[0].task.start.as_tensors()
    assert all(torch.equal(begun[key], own[key]) for key in own)
    assert all(torch.equal(begun[key], tensor) for key, tensor in start.as_tensors(frozenset("a")).items())
    assert seen[0].task.optimiser_state is not None


def test_training_that_diverges_is_a_failure_and_leaves_the_memory_as_it_was() -> None:
    work = Work(sends=frozenset(), keeps=frozenset("ab"))
    client, start = client_of(work), random_adapter(3)

    def diverge(assignment: Assignment) -> ClientResult:
        result = moved(assignment)
        return replace(result, adapter=result.adapter.scaled(float("nan")))

    sent = Broadcast(1, 0, 2, 2.0, News(), start)
    blob = client.handle(encode_broadcast(sent, WireDtype.FP32), diverge, WireDtype.FP32)
    outcome = decode_answer(blob, sent, work, SHAPES, WireDtype.FP32, lambda draw: start)
    assert isinstance(outcome, Failure)
    assert "finite" in outcome.reason
    assert client.memory.is_empty


@pytest.mark.parametrize("name", METHODS)
def test_a_client_whose_training_failed_starts_from_what_the_others_start_from(name: str) -> None:
    strategy, rules = METHODS[name]()
    engine, records = run(strategy, rules, lambda n: [0, 1, 2], 6, lambda a: a.task.client == 0 and a.round in (2, 3))
    assert [[c.client for c in record.clients if c.reason] for record in records] == [[], [0], [0], [], [], []]
    for round, record in enumerate(records[:-1], start=2):
        start = strategy.start_for(record.state, 0)
        wanted = start.adapter(SHAPES, RANKS[0], 1) if isinstance(start, Draw) else start
        (got,) = [a.task.start.as_tensors() for a in engine.seen if (a.round, a.task.client) == (round, 0)]
        shared = wanted.as_tensors(BOTH - strategy.client.work(round).keeps)
        assert all(torch.equal(tensor, got[key]) for key, tensor in shared.items()), round


def test_what_goes_wrong_in_training_is_told_in_bytes_with_the_version_held() -> None:
    def fail(assignment: Assignment) -> ClientResult:
        raise ModelError(f"expected a model that trains, got none for round {assignment.round}; load one")

    sent = Broadcast(1, 0, 2, 2.0, News(), random_adapter(3))
    blob = client_of(Work()).handle(encode_broadcast(sent, WireDtype.FP32), fail, WireDtype.FP32)
    outcome = decode_answer(blob, sent, Work(), SHAPES, WireDtype.FP32, lambda draw: random_adapter(3))
    assert outcome == Failure(0, "expected a model that trains, got none for round 1; load one", 0)
