"""Which tokens train which adapter: the slots of a cohort and the segments of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedloom.errors import ModelError
from fedloom.lora.dropout import Dropout


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


@dataclass
class Route:
    """Which token rows belong to which slot in the passes that follow; shared by all modules of a model.

    ``samples`` are those of each segment, as in :class:`Block`.
    """

    slots: list[Slot] = field(default_factory=list)
    segments: list[tuple[int, int]] = field(default_factory=list)
    everything_to: int | None = None
    dropout: Dropout | None = None
    samples: list[list[slice]] = field(default_factory=list)

    def total_rank(self, most: int) -> int:
        """Sum of the slots' ranks in a module that holds ``most`` of each: rows of ``a_RI`` and ``bt_RO``."""
        return sum(min(slot.rank, most) for slot in self.slots)

    def rows_of(self, slot: int, most: int) -> slice:
        """Rows of ``a_RI`` and ``bt_RO`` that belong to a slot."""
        start = sum(min(s.rank, most) for s in self.slots[:slot])
        return slice(start, start + min(self.slots[slot].rank, most))

    def blocks(self, num_tokens: int, most: int) -> list[Block]:
        """Return the block of every segment, in order.

        Raises:
            ModelError: if the segments do not add up to the tokens that arrived.
        """
        if not self.segments:
            slot = self.everything_to
            return [] if slot is None else [Block(slot, slice(0, num_tokens), self.rows_of(slot, most), [])]
        blocks, start = [], 0
        for (slot, count), samples in zip(self.segments, self.samples, strict=True):
            blocks.append(Block(slot, slice(start, start + count), self.rows_of(slot, most), samples))
            start += count
        if start != num_tokens:
            raise ModelError(
                f"expected {start} token rows as routed to the slots, got {num_tokens}; call route() again"
            )
        return blocks


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
