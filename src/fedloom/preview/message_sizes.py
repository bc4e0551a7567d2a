"""How many bytes a recipe's messages take, measured on messages of zeros as they would cross."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.assembly.round_plan import rules_of, sketch_rank_of, strategy_of
from fedloom.config import Settings
from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import encode_broadcast
from fedloom.federation.messages import MOMENTS, answer_dtype, encode_update, moments_entries
from fedloom.lora.initial import Draw
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import BOTH, Adapter, Pair, rank_in
from fedloom.methods.client_half import SKETCH, Moments, Work
from fedloom.methods.gradient_start import sketch_rank
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.state import Broadcast, Difference, News, ServerState, Update
from fedloom.methods.strategy import Cohort
from fedloom.privacy.secure_sum.identities import SIGNATURE_BYTES
from fedloom.privacy.secure_sum.wire import bytes_of_member
from fedloom.training.stats import TrainingStats

MEASURED_NUMBERS = 2**26
"""Numbers in a message that is written to be measured."""


class OfClient(NamedTuple):
    """Bytes of a client's messages: its update, its first broadcast and a later one."""

    up: int = 0
    first_down: int = 0
    later_down: int = 0


@dataclass(frozen=True)
class MessageSizes:
    """Bytes of every client's messages, which depend on its rank alone.

    ``start`` are up and down of each of ``sketch_cohort_size`` clients where the first A comes from the gradient.
    """

    ranks: tuple[int, ...]
    by_rank: Mapping[int, OfClient]
    sketch_cohort_size: int = 0
    start: tuple[int, int] = (0, 0)

    def of_clients(self, kind: str) -> tuple[int, ...]:
        """Return one field of :class:`OfClient`, in the order of the clients."""
        sizes = {rank: getattr(own, kind) for rank, own in self.by_rank.items()}
        return tuple(map(sizes.__getitem__, self.ranks))

    def of_run(self, cohort_size: int, num_rounds: int) -> tuple[float, float]:
        """Return bytes up and down of a run in which the cohort of every round is an average one that missed none."""
        shares = {rank: num / len(self.ranks) for rank, num in Counter(self.ranks).items()}
        up, first, later = (sum(shares[rank] * own[kind] for rank, own in self.by_rank.items()) for kind in range(3))
        start_up, start_down = (self.sketch_cohort_size * num_bytes for num_bytes in self.start)
        return start_up + cohort_size * num_rounds * up, start_down + cohort_size * (first + (num_rounds - 1) * later)


def message_sizes(settings: Settings, lora: LoRAModel, ranks: tuple[int, ...]) -> MessageSizes:
    """Return the bytes of every client's messages, for a cohort of the average rank.

    Where a method's rounds differ, a later one is the mean of two.
    """
    if not settings.traits.aggregates:
        return MessageSizes(ranks, dict.fromkeys(ranks, OfClient()))
    wire, sizes = WireDtype(settings.wire.dtype), dict[int, OfClient]()
    strategy = strategy_of(settings, Cohort(lora.shapes, max(ranks), ranks.__getitem__, settings.run.seed))
    state = ServerState(round=settings.start_rounds, start=_zeros(lora, max(ranks)))
    works = [strategy.client.work(settings.start_rounds + round) for round in (1, 2)]
    unknown = frozenset("a") if settings.start_rounds else frozenset()
    parts, beyond = _addition(settings, lora, ranks)
    later = News(1, 2, parts)
    for rank in dict.fromkeys(ranks):
        client = ranks.index(rank)
        moments = _second_moments(lora, rank, works[0])
        update = Update(1, client, _zeros(lora, rank), TrainingStats(1), began_sha256="0" * 64, moments=moments)
        up = fmean(len(encode_update(update, update.adapter.as_tensors(work.sends), wire)) for work in works)
        start, origin = strategy.start_for(state, client), strategy.origin
        crossing = [BOTH if origin is None else work.sends for work in works]
        first = Broadcast(1, client, rank, 1.0, News(), start, unknown if origin else BOTH, origin)
        others = [Broadcast(3, client, rank, 1.0, later, start, factors, origin) for factors in crossing]
        if wire.is_coded and isinstance(start, Adapter):
            step = Difference("0" * 64, start, start)
            first = replace(first, crossing=unknown if strategy.drawn else BOTH, origin=strategy.drawn)
            first = replace(first, difference=replace(step, since="") if strategy.drawn else None)
            others = [replace(one, difference=step, origin=strategy.drawn) for one in others]
        others = [
            replace(one, moments=_second_moments(lora, rank, work), control=_variates(lora, rank, work))
            for one, work in zip(others, works, strict=True)
        ]
        down = fmean(len(encode_broadcast(broadcast, wire)) for broadcast in others)
        sizes[rank] = OfClient(round(up), len(encode_broadcast(first, wire)), round(down) + beyond)
    if isinstance(strategy, MaskedSums):
        up, down = bytes_of_member(settings.cohort_size, strategy.num_numbers, SIGNATURE_BYTES)
        sizes = {rank: OfClient(up, one.first_down + down, one.later_down + down) for rank, one in sizes.items()}
    if not settings.start_rounds:
        return MessageSizes(ranks, sizes)
    return MessageSizes(ranks, sizes, settings.sketch_cohort_size, _start_bytes(settings, lora, max(ranks)))


def _start_bytes(settings: Settings, lora: LoRAModel, max_rank: int) -> tuple[int, int]:
    """Return the bytes of a sketch, and of the message that asks for it."""
    rank, wire = sketch_rank(max_rank), WireDtype(settings.wire.dtype)
    update = Update(1, 0, _zeros(lora, rank), TrainingStats(1))
    sketch = encode_update(update, update.adapter.as_tensors(SKETCH.sends), answer_dtype(SKETCH, wire))
    asking = Broadcast(1, 0, rank, 1.0, News(), Draw(("sketch",), rank, random="b"))
    return len(sketch), len(encode_broadcast(asking, wire))


def _addition(settings: Settings, lora: LoRAModel, ranks: tuple[int, ...]) -> tuple[tuple[Adapter, ...], int]:
    """Return what a round adds to the side, and bytes beyond it where only a part of a large stack is measured.

    That is the cohort's stack, and the mean beside it where a start is averaged.
    """
    if not settings.traits.grows_side or settings.server.step == "adamw":
        return (), 0
    if (limit := rules_of(settings, lora.shapes).max_bytes) is not None:
        return (_zeros(lora, 1),), limit  # the names and sizes of its tensors come on top
    share = settings.cohort_size / len(ranks)
    stacked = round(sum(ranks) * share)
    if not settings.traits.starts_fresh:
        return (_zeros(lora, stacked + max(ranks)),), 0
    cut = sketch_rank_of(settings)
    if settings.method.broadcast == "compressed":
        return (_zeros(lora, stacked if cut is None else min(stacked, cut)),), 0
    # A narrow module's part of the stack is lower: each client's is of the rank that the module takes.
    having = Counter(ranks).items()
    stacks = {
        name: round(sum(num * rank_in(shape, rank) for rank, num in having) * share)
        for name, shape in lora.shapes.items()
    }
    if cut is not None:  # the sum has a pair of the rank that it can have
        stacks = {name: rank_in(lora.shapes[name], min(rank, cut)) for name, rank in stacks.items()}
    most = max(1, MEASURED_NUMBERS // sum(map(sum, lora.shapes.values())))
    beyond = sum(max(0, stacks[name] - most) * sum(shape) for name, shape in lora.shapes.items())
    measured = _pairs(lora, {name: min(rank, most) for name, rank in stacks.items()})
    return (measured,), beyond * WireDtype(settings.wire.dtype).bits // 8


def _second_moments(lora: LoRAModel, rank: int, work: Work) -> dict[str, Tensor]:
    """Return second moments of the size in which they cross, where clients share them."""
    if work.moments is not Moments.SHARED:
        return {}
    entries = moments_entries(lora.shapes, rank, work.trains)
    return {key.removeprefix(MOMENTS): torch.zeros(shape) for key, (_, shape) in entries.items()}


def _variates(lora: LoRAModel, rank: int, work: Work) -> dict[str, Tensor]:
    """Return control variates of the size in which they cross, where they correct clients' steps."""
    return _zeros(lora, rank).as_tensors(work.sends) if work.corrects else {}


def _zeros(lora: LoRAModel, rank: int) -> Adapter:
    """Return pairs of a rank, or of the highest one that a module can have."""
    return _pairs(lora, {name: rank_in(shape, rank) for name, shape in lora.shapes.items()})


def _pairs(lora: LoRAModel, ranks: Mapping[str, int]) -> Adapter:
    """Return pairs of zeros, each of its module's rank."""
    return Adapter(
        {name: Pair(torch.zeros(o, ranks[name]), torch.zeros(ranks[name], i)) for name, (o, i) in lora.shapes.items()}
    )
