"""The server between two rounds: what each client must be sent, and the next state from an aggregate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median

import torch

from fedloom.federation.blob import WireDtype, as_received
from fedloom.lora.algebra import compress, distance, norm, stack, total
from fedloom.lora.pair import BOTH, Adapter, Factors
from fedloom.methods.server_steps import ServerStep
from fedloom.methods.side import digest, grown
from fedloom.methods.state import Aggregate, Broadcast, News, ServerState, StepMemory
from fedloom.methods.strategy import Strategy


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
        wire: dtype of what is sent; the server adopts what the clients will see.
    """

    step: ServerStep
    form: BroadcastForm = BroadcastForm.STACK
    tolerance: float = 0.0
    wire: WireDtype = WireDtype.FP32


def broadcasts_for(
    state: ServerState,
    clients: Iterable[int],
    strategy: Strategy,
    rank_of: Mapping[int, int],
    scale_of: Mapping[int, float],
) -> list[Broadcast]:
    """Return what each client is sent: the news since the version it holds, and its start."""
    sha256 = digest(state.side)
    return [
        Broadcast(
            round=state.round + 1,
            client=client,
            rank=rank_of[client],
            scale=scale_of[client],
            news=news_for(state, state.seen.get(client, 0), sha256),
            start=strategy.start_for(state, client),
            crossing=_crossing(state, strategy, client),
            origin=strategy.origin,
        )
        for client in clients
    ]


def addressed(broadcast: Broadcast, state: ServerState, strategy: Strategy, held: int | None) -> Broadcast:
    """Return a broadcast for a client that says itself which version it holds; None: send it the whole side."""
    seen = replace(state, seen={broadcast.client: held or 0})
    sha256 = broadcast.news.sha256
    whole = News(0, state.round, (state.side,), True, sha256)
    return replace(
        broadcast,
        news=whole if held is None else news_for(seen, held, sha256),
        crossing=_crossing(seen, strategy, broadcast.client),
    )


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
    norms: Iterable[float],
    held: Mapping[int, int],
    sent: Factors = BOTH,
) -> ServerState:
    """Return the state after a round: the server step taken, the addition in the form in which it is sent.

    ``held`` are the versions of the side that clients said they hold; nobody else is believed to be up to date.
    ``sent`` are the factors that this round's clients sent; a factor that never crosses is never rounded.
    """
    change = aggregate.change(state.start)
    before = StepMemory(state.velocity, state.moments)
    movement, memory = rules.step.move(change, aggregate.mean_squared_norm, before)
    joining = _joining(aggregate, change, movement)
    addition, residual = _in_sending_form(total([joining, state.residual]), rules)
    side = grown(state.side, addition)
    start = aggregate.start
    if start is not None:
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
        typical_norm=median(norms),
    )


def aggregation_noise(applied: Adapter, ideal: Adapter) -> float | None:
    """Return ``‖applied − Σ p_k s_k B_k A_k‖ / ‖Σ p_k s_k B_k A_k‖``; None where nothing is aggregated."""
    if not ideal:
        return None
    whole = norm(ideal)
    return distance(applied.to(torch.float64), ideal) / whole if whole > 0.0 else 0.0


def _joining(aggregate: Aggregate, change: Adapter, movement: Adapter) -> Adapter:
    """Return what of a movement the side must carry: all that the next start does not move by itself."""
    if aggregate.start is None:
        return movement
    if movement is change:
        return aggregate.side
    beyond = compress(stack([movement, change], [1.0, -1.0])).adapter
    return total([aggregate.side, beyond])


def _in_sending_form(addition: Adapter, rules: ServerRules) -> tuple[Adapter, Adapter]:
    """Return what is sent and what is held back for the next round."""
    if not addition:
        return addition, Adapter()
    if rules.form is BroadcastForm.STACK:
        return as_received(addition, rules.wire), Adapter()
    sent = as_received(compress(addition, tolerance=rules.tolerance).adapter, rules.wire)
    if rules.tolerance == 0.0 and rules.wire is WireDtype.FP32:
        return sent, Adapter()
    return sent, compress(stack([addition, sent], [1.0, -1.0])).adapter


def _worth_keeping(chain: tuple[Adapter, ...], side: Adapter) -> tuple[Adapter, ...]:
    """Drop the oldest additions once all of them together are larger than the side itself."""
    kept = list(chain)
    while len(kept) > 1 and sum(part.num_bytes for part in kept) > side.num_bytes:
        kept.pop(0)
    return tuple(kept)
