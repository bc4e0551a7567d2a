"""What a receiver of frames dropped, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Dropped:
    """What a receiver dropped, by its sender and a word for the reason; at most so many different ones."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _LARGEST = 1 << 10

    def add(self, sender: str, why: str) -> None:
        """Count one message."""
        key = (sender[:200], why)
        if key in self.counts or len(self.counts) < self._LARGEST:
            self.counts[key] += 1

    @property
    def total(self) -> int:
        """Messages dropped in all."""
        return sum(self.counts.values())
