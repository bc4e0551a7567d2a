"""The server between two rounds: what each client must be sent, and the next state from an aggregate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median

import torch
from torch import Tensor

from fedloom.federation.blob import WireDtype
from fedloom.federation.coding import as_received, num_bytes_of, rounded
from fedloom.federation.module_figures import Noise
from fedloom.lora.algebra import compress, stack, total, truncate, truncate_pair
from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter, Factors, Pair, rank_in
from fedloom.methods.client_half import Moments
from fedloom.methods.server_steps import ServerStep
from fedloom.methods.side import digest, grown
from fedloom.methods.state import Aggregate, Broadcast, Difference, News, ServerState, StepMemory
from fedloom.methods.strategy import Strategy
from fedloom.training.moments import ROWS

VIEWS_KEPT = 1000
"""Clients of which the server remembers the start that they hold; one forgotten is sent the difference to the first."""

RESIDUAL_RANK = 256
"""Rank up to which a module's residual is kept: beyond it, what would wait for many rounds more is dropped."""


class BroadcastForm(StrEnum):
    """Whether an addition to the side is sent as the stack it is (FLoRA) or compressed first (ours)."""

    STACK = "stack"
    COMPRESSED = "compressed"


@dataclass(frozen=True)
class ServerRules:
    """How the server turns aggregates into states, whatever the strategy.

    Attributes:
        step: the server step on the aggregated product.
        form: the form in which additions to the side are sent.
        tolerance: share of an addition's energy that compression may hold back for later rounds; 0 is lossless.
        max_bytes: bytes that a compressed addition may take on the wire; what is left out waits for later rounds.
        wire: dtype of what is sent; the server adopts what the clients will see.
    """

    step: ServerStep
    form: BroadcastForm = BroadcastForm.STACK
    tolerance: float = 0.0
    wire: WireDtype = WireDtype.FP32
    max_bytes: int | None = None


def broadcasts_for(
    state: ServerState,
    clients: Iterable[int],
    strategy: Strategy,
    rank_of: Mapping[int, int],
    scale_of: Mapping[int, float],
    wire: WireDtype = WireDtype.FP32,
) -> list[Broadcast]:
    """Return what each client is sent: the news since the version it holds, and its start.

    On a wire of few bits that is the difference to the start that the client holds.
    """
    sha256 = digest(state.side)
    broadcasts = []
    for client in clients:
        start = strategy.start_for(state, client)
        sketch_rank = start.sketch_rank if isinstance(start, Draw) else None
        broadcasts.append(
            Broadcast(
                round=state.round + 1,
                client=client,
                rank=sketch_rank or rank_of[client],
                scale=scale_of[client],
                news=news_for(state, state.seen.get(client, 0), sha256),
                start=start,
                crossing=_crossing(state, strategy, client),
                origin=None if isinstance(start, Draw) else strategy.origin,
                moments=moments_for(rank_of[client], state, strategy),
                control=control_for(rank_of[client], state, strategy),
            )
        )
    if not wire.is_coded:
        return broadcasts
    views = {one.client: state.views.get(one.client) for one in broadcasts}
    first = _first_start(strategy) if None in views.values() else None
    return [in_few_bits(one, views[one.client], first, strategy, wire) for one in broadcasts]


def addressed(
    broadcast: Broadcast, state: ServerState, strategy: Strategy, held: int | None, wire: WireDtype
) -> Broadcast:
    """Return a broadcast for a client that says itself which version it holds; None: send it the whole side.

    Only a client that holds what the server believes has the start that a difference can be added to.
    """
    client = broadcast.client
    seen = replace(state, seen={client: held or 0})
    sha256 = broadcast.news.sha256
    whole = News(0, state.round, (state.side,), True, sha256)
    news = whole if held is None else news_for(seen, held, sha256)
    if wire.is_coded:
        view = state.views.get(client) if held == state.seen.get(client) else None
        first = _first_start(strategy) if view is None else None
        return in_few_bits(replace(broadcast, news=news, difference=None), view, first, strategy, wire)
    return replace(broadcast, news=news, crossing=_crossing(seen, strategy, client))


def _first_start(strategy: Strategy) -> Adapter | None:
    """Return the start that every client can draw by itself, where the method has one."""
    return None if strategy.drawn is None else strategy.initial().start


def moments_for(rank: int, state: ServerState, strategy: Strategy) -> dict[str, Tensor]:
    """Return the second moments that clients share, of a client's first slots: zero where nobody has had the slot."""
    if strategy.client.work(state.round + 1).moments is not Moments.SHARED:
        return {}
    assert state.start is not None
    found = {}
    for key, tensor in state.optimiser.items():
        own = rank_in(state.start[key.rpartition(".")[0][:-2]].shape, rank)
        slots = torch.nn.functional.pad(tensor[:own], (0, max(0, own - len(tensor))))
        found[key] = slots if key.endswith(ROWS) else tensor
    return found


def control_for(rank: int, state: ServerState, strategy: Strategy) -> dict[str, Tensor]:
    """Return how far a round carries all clients on average, of a client's first slots; nothing before it is known."""
    if not strategy.client.work(state.round + 1).corrects:
        return {}
    return {key: tensor[:rank] if key.endswith(".a") else tensor[:, :rank] for key, tensor in state.control.items()}


def in_few_bits(
    broadcast: Broadcast, view: Adapter | None, first: Adapter | None, strategy: Strategy, wire: WireDtype
) -> Broadcast:
    """Return a broadcast of which the difference to what its client holds crosses, rounded as the wire does.

    ``view`` is the start that the client holds; None: none that is known of. Then the difference is to the ``first``
    start, which every client draws by itself; where the method has none, the whole start crosses in fp32.
    """
    if not isinstance(broadcast.start, Adapter):
        return broadcast
    start, held, since = broadcast.start, view, ""
    if held is None:
        if first is None:
            return replace(broadcast, crossing=BOTH)
        held = truncate(first, max(start.ranks.values()))
    else:
        since = digest(held)
    before, wanted = held.as_tensors(), start.as_tensors()
    step = rounded({key: tensor - before[key] for key, tensor in wanted.items()}, wire)
    after = held.with_factors({key: before[key] + step[key] for key in step})
    crossing = frozenset(key[-1] for key, tensor in step.items() if bool(tensor.any()))
    difference = Difference(since, Adapter.from_tensors(step), after)
    return replace(broadcast, crossing=crossing, origin=strategy.drawn, difference=difference)


def views_after(state: ServerState, broadcasts: Iterable[Broadcast], began: Mapping[int, str]) -> dict[int, Adapter]:
    """Return the start that each client is known to hold: those of this round that say so, others as before.

    One that was asked and does not confirm may hold the start of before or the new one, so nothing is known of it.
    """
    views = dict(state.views)
    for broadcast in broadcasts:
        views.pop(broadcast.client, None)
        held = broadcast.start if broadcast.difference is None else broadcast.difference.after
        if isinstance(held, Adapter) and began.get(broadcast.client) == digest(held):
            views[broadcast.client] = held
    for oldest in list(views)[:-VIEWS_KEPT]:
        del views[oldest]
    return views


def news_for(state: ServerState, version: int, sha256: str) -> News:
    """Return the cheaper way from a held version to the present side: the missed additions, or all of it."""
    missed = state.round - version
    if missed == 0:
        return News(version, version, (), False, sha256)
    if state.side and missed <= len(state.chain):
        parts = state.chain[len(state.chain) - missed :]
        if version == 0 or sum(part.num_bytes for part in parts) <= state.side.num_bytes:
            return News(version, state.round, parts, False, sha256)
    return News(0, state.round, (state.side,), True, sha256)


def _crossing(state: ServerState, strategy: Strategy, client: int) -> Factors:
    """Return the factors of a client's start that it cannot hold already: all, or those sent since it took part."""
    if strategy.origin is None:
        return BOTH
    rounds = range(state.seen.get(client, 0) + 1, state.round + 1)
    return frozenset().union(*(strategy.client.work(round).sends for round in rounds))


def next_state(
    state: ServerState,
    aggregate: Aggregate,
    rules: ServerRules,
    norms: Sequence[float],
    held: Mapping[int, int],
    sent: Factors = BOTH,
    views: Mapping[int, Adapter] | None = None,
) -> ServerState:
    """Return the state after a round: the server step taken, the addition in the form in which it is sent.

    ``norms`` are those of the clients' changes, none where the next round's are not to be compared with them.
    ``held`` are the versions of the side that clients said they hold; nobody else is believed to be up to date.
    ``sent`` are the factors that this round's clients sent; a factor that never crosses is never rounded.
    ``views`` are the starts that clients hold, where they cross as differences.
    """
    change = aggregate.change(state.start)
    before = StepMemory(state.velocity, state.moments)
    movement, memory = rules.step.move(change, aggregate.mean_squared_norm, before)
    joining = _joining(aggregate, change, movement)
    addition, residual = _in_sending_form(total([joining, state.residual]), rules)
    side = grown(state.side, addition)
    start = aggregate.start
    if start is not None and not rules.wire.is_coded:
        start = start.with_factors(as_received(start, rules.wire).as_tensors(sent))
    return replace(
        state,
        round=state.round + 1,
        side=side,
        start=start,
        chain=_worth_keeping((*state.chain, addition), side),
        seen={**state.seen, **held},
        velocity=memory.velocity,
        moments=memory.moments,
        residual=residual,
        typical_norm=median(norms) if norms else None,
        views={} if views is None else views,
        optimiser=aggregate.optimiser,
        control=aggregate.control,
    )


def as_applied(aggregate: Aggregate, wire: WireDtype) -> Adapter:
    """Return an aggregate as the wire lets clients see it; in few bits they see a start ever more nearly, in time."""
    return aggregate.applied if wire.is_coded and aggregate.start is not None else as_received(aggregate.applied, wire)


def aggregation_noise(applied: Adapter, ideal: Adapter) -> float | None:
    """Return ``‖applied − Σ p_k s_k B_k A_k‖ / ‖Σ p_k s_k B_k A_k‖``; None where nothing is aggregated."""
    return Noise.of(applied, ideal).in_all


def _joining(aggregate: Aggregate, change: Adapter, movement: Adapter) -> Adapter:
    """Return what of a movement the side must carry: all that the next start does not move by itself."""
    if aggregate.start is None:
        return movement
    if movement is change:
        return aggregate.side
    beyond = compress(stack([movement, change], [1.0, -1.0])).adapter
    return total([aggregate.side, beyond])


def _in_sending_form(addition: Adapter, rules: ServerRules) -> tuple[Adapter, Adapter]:
    """Return what is sent and what is held back for the next round.

    One decomposition serves both: what is sent are its first directions, what is held back the others.
    """
    if not addition:
        return addition, Adapter()
    if rules.form is BroadcastForm.STACK:
        return as_received(addition, rules.wire), Adapter()
    whole = compress(addition)
    smaller = whole.within(rules.tolerance)
    if rules.max_bytes is not None:
        smaller = within(smaller, rules.max_bytes, rules.wire)
    sent = as_received(smaller, rules.wire)
    is_rounded = bool(smaller) and rules.wire is not WireDtype.FP32
    rounded_off = stack([smaller, sent], [1.0, -1.0]) if is_rounded else Adapter()
    return sent, total([rounded_off, _waiting(whole.adapter, smaller, rounded_off)])


def _waiting(whole: Adapter, chosen: Adapter, rounded_off: Adapter) -> Adapter:
    """Return the strongest of the directions that were not chosen, as many as there is room for beside the rounding."""
    pairs = {}
    for name, pair in whole.items():
        first = chosen[name].rank if chosen else 0
        last = first + max(0, RESIDUAL_RANK - (rounded_off[name].rank if rounded_off else 0))
        pairs[name] = Pair(pair.b_OR[:, first:last], pair.a_RI[first:last])
    return Adapter(pairs if any(pair.rank for pair in pairs.values()) else {})


def within(addition: Adapter, max_bytes: int, wire: WireDtype) -> Adapter:
    """Return the directions of a compressed addition that hold most of its energy in so many bytes.

    Of all modules' singular directions those are taken first that have the most energy a byte on the wire.
    """
    directions = [
        (float(value) ** 2 / cost, -place, name, cost)
        for name, pair in addition.items()
        if (cost := num_bytes_of({"one.b": (pair.shape[0], 1), "one.a": (1, pair.shape[1])}, wire))
        for place, value in enumerate(pair.b_OR.double().norm(dim=0) * pair.a_RI.double().norm(dim=1))
    ]
    ranks, left = dict.fromkeys(addition, 0), max_bytes
    for *_, name, cost in sorted(directions, reverse=True):
        if cost > left:
            break
        ranks[name], left = ranks[name] + 1, left - cost
    # All modules stay, of rank 0 where nothing fits: additions are added up module by module.
    cut = {name: truncate_pair(pair, ranks[name]) for name, pair in addition.items()}
    return Adapter(cut if any(ranks.values()) else {})


def _worth_keeping(chain: tuple[Adapter, ...], side: Adapter) -> tuple[Adapter, ...]:
    """Drop the oldest additions once all of them together are larger than the side itself."""
    kept = list(chain)
    while len(kept) > 1 and sum(part.num_bytes for part in kept) > side.num_bytes:
        kept.pop(0)
    return tuple(kept)
