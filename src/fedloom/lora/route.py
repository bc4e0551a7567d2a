"""Which tokens train which adapter: the slots of a cohort and the segments of a packed batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedloom.errors import ModelError
from fedloom.lora.dropout import Dropout


@dataclass(frozen=True)
class Slot:
    """Room for one client's adapter: its rank and its scale s (``alpha / r``)."""

    rank: int
    scale: float


@dataclass
class Route:
    """Which token rows belong to which slot in the passes that follow; shared by all modules of a model."""

    slots: list[Slot] = field(default_factory=list)
    segments: list[tuple[int, int]] = field(default_factory=list)
    everything_to: int | None = None
    dropout: Dropout | None = None

    def total_rank(self, most: int) -> int:
        """Sum of the slots' ranks in a module that holds ``most`` of each: rows of ``a_RI`` and ``bt_RO``."""
        return sum(min(slot.rank, most) for slot in self.slots)

    def rows_of(self, slot: int, most: int) -> slice:
        """Rows of ``a_RI`` and ``bt_RO`` that belong to a slot."""
        start = sum(min(s.rank, most) for s in self.slots[:slot])
        return slice(start, start + min(self.slots[slot].rank, most))

    def blocks(self, num_tokens: int, most: int) -> list[tuple[int, slice, slice]]:
        """Return (slot, token rows, factor rows) of every segment.

        Raises:
            ModelError: if the segments do not add up to the tokens that arrived.
        """
        if not self.segments:
            slot = self.everything_to
            return [] if slot is None else [(slot, slice(0, num_tokens), self.rows_of(slot, most))]
        blocks, start = [], 0
        for slot, count in self.segments:
            blocks.append((slot, slice(start, start + count), self.rows_of(slot, most)))
            start += count
        if start != num_tokens:
            raise ModelError(
                f"expected {start} token rows as routed to the slots, got {num_tokens}; call route() again"
            )
        return blocks
