"""Which tokens train which adapter: the slots of a cohort and the segments of a packed batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom.errors import ModelError
from fedloom.lora.dropout import Dropout
from fedloom.lora.grouped import Bucket, buckets_of
from fedloom.lora.turns import Turn

FEWEST_ROWS = 4
"""Rows of a matrix product at least, so that a row's result does not depend on how many there are."""

ONE_BY_ONE = frozenset({"cpu", "meta"})
"""Kinds of devices on which clients' products are taken one after the other."""


@dataclass(frozen=True)
class Slot:
    """Room for one client's adapter: its rank and its scale s (``alpha / r``)."""

    rank: int
    scale: float


class Block(NamedTuple):
    """A segment in one module: its slot, its token rows, its factor rows, and its samples as parts of the token rows.

    No samples where they are not told apart.
    """

    slot: int
    tokens: slice
    rows: slice
    samples: list[slice]


@dataclass(frozen=True)
class Owners:
    """Whose the token rows of a pass are: ``[(slot, rows), ...]`` in order.

    ``samples`` are those of each segment, as in :class:`Block`. ``grouped`` are the buckets made so far for this pass,
    by the slots' ranks, which narrow modules cut.
    """

    segments: list[tuple[int, int]] = field(default_factory=list)
    samples: list[list[slice]] = field(default_factory=list)
    dropout: Dropout | None = None
    grouped: dict[tuple[int, ...], list[Bucket]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the pass."""
        return sum(count for _, count in self.segments)


class _Here(threading.local):
    """What a thread's next passes are routed to."""

    def __init__(self) -> None:
        self.everything_to: int | None = None
        self.whole = Owners()
        self.chosen: Owners | None = None
        self.turn: Turn | None = None

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what routes a thread's passes as this thread's are now, without a turn: it adds no gradients."""
        kept = {**self.__dict__, "turn": None}

        @contextmanager
        def routed() -> Iterator[None]:
            before = dict(self.__dict__)
            self.__dict__.update(kept)
            try:
                yield
            finally:
                self.__dict__.update(before)

        return routed

    def __deepcopy__(self, memo: dict[int, Any]) -> _Here:
        """Copy what this thread's passes are routed to: a model may be copied, a ``threading.local`` cannot."""
        copied = memo[id(self)] = _Here()
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied


@dataclass
class Route:
    """Which token rows belong to which slot in the passes that follow; shared by all modules of a model.

    The slots are everybody's; ``here`` is each thread's own, so that several passes may be under way. Some modules see
    only chosen rows of the pass: ``here.chosen`` are the owners of these, told by how many rows arrive.
    """

    slots: list[Slot] = field(default_factory=list)
    here: _Here = field(default_factory=_Here)

    def owners(self, num_rows: int) -> Owners:
        """Return whose the rows are that arrive at a module, by how many they are."""
        here = self.here
        return here.chosen if here.chosen is not None and num_rows == here.chosen.num_rows else here.whole

    def total_rank(self, most: int) -> int:
        """Sum of the slots' ranks in a module that holds ``most`` of each: rows of ``a_RI`` and ``bt_RO``."""
        return sum(min(slot.rank, most) for slot in self.slots)

    def rows_of(self, slot: int, most: int) -> slice:
        """Rows of ``a_RI`` and ``bt_RO`` that belong to a slot."""
        start = sum(min(s.rank, most) for s in self.slots[:slot])
        return slice(start, start + min(self.slots[slot].rank, most))

    def buckets(self, blocks: Sequence[Block], x_TI: Tensor) -> list[Bucket]:
        """Return the blocks of a module's rows in buckets whose products are taken together; none if one by one.

        One by one on a CPU, whose bits then do not depend on who shares a pass, and where there is but one.
        """
        if x_TI.device.type in ONE_BY_ONE or len(blocks) < 2:
            return []
        grouped, ranks = self.owners(len(x_TI)).grouped, tuple(block.rows.stop for block in blocks)
        if ranks not in grouped:
            grouped[ranks] = buckets_of(blocks, [slot.scale for slot in self.slots], x_TI)
        return grouped[ranks]

    def blocks(self, num_tokens: int, most: int) -> list[Block]:
        """Return the block of every segment, in order.

        Raises:
            ModelError: if the segments do not add up to the tokens that arrived.
        """
        owners = self.owners(num_tokens)
        if not owners.segments:
            slot = self.here.everything_to
            return [] if slot is None else [Block(slot, slice(0, num_tokens), self.rows_of(slot, most), [])]
        blocks, start = [], 0
        for (slot, count), samples in zip(owners.segments, owners.samples, strict=True):
            blocks.append(Block(slot, slice(start, start + count), self.rows_of(slot, most), samples))
            start += count
        if start != num_tokens:
            raise ModelError(
                f"expected {start} token rows as routed to the slots, got {num_tokens}; call route() again"
            )
        return blocks


def chosen_of(whole: Owners, lengths: Sequence[int], chosen_K: Tensor) -> Owners:
    """Return the owners of these rows of a pass, ascending."""
    ends_N = torch.tensor(lengths).cumsum(0)
    sample_of_row_K = torch.searchsorted(ends_N, chosen_K.cpu(), right=True)
    left = iter(torch.bincount(sample_of_row_K, minlength=len(lengths)).tolist())
    segments, samples = [], []
    for (slot, _), of_segment in zip(whole.segments, whole.samples, strict=True):
        own, end = list[slice](), 0
        for _ in of_segment:
            start, end = end, end + next(left)
            own.append(slice(start, end))
        segments.append((slot, end))
        samples.append(own)
    return Owners(segments, samples, whole.dropout and whole.dropout.at(chosen_K))


def samples_of(counts: Sequence[int], lengths: Sequence[int]) -> list[list[slice]]:
    """Return the samples of each segment, by the segments' tokens and the samples' in order; none without lengths."""
    rest, samples = iter(lengths), list[list[slice]]()
    for count in counts:
        own, end = list[slice](), 0
        while lengths and end < count:
            start, end = end, end + next(rest)
            own.append(slice(start, end))
        samples.append(own)
    return samples
