"""What the server knows of each site while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedloom.sites import policy
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import Ready

AWAY_SECONDS = 20.0
"""A site that has not been heard of for this long is not waited for beyond the quorum."""


@dataclass
class SiteState:
    """One site: where it stands, what it holds, and how its last round went. Times are of the engine's clock.

    Of its task: when it was ``posted``, of how many bytes, and on which of the site's connections.
    """

    name: str
    client: int
    is_withdrawn: bool = False
    last_seen: float | None = None
    sheet_sent: float | None = None
    ready: Ready | None = None
    posted: float | None = None
    posted_bytes: int = 0
    posted_on: int = 0
    is_whole_sent: bool = False
    held: int = 0
    last_loss: float | None = None
    seconds: float | None = None
    epsilon: float | None = None
    left_out: str | None = None
    memory_lost: bool = False
    versions: str = ""

    @property
    def refusal(self) -> Refusal | None:
        """Why it does not take part at all."""
        return None if self.ready is None else self.ready.refusal

    @property
    def is_usable(self) -> bool:
        """Whether it can be given a task."""
        return self.ready is not None and self.ready.refusal is None

    def is_near(self, now: float) -> bool:
        """Tell whether it was heard of lately."""
        return self.last_seen is not None and now - self.last_seen <= AWAY_SECONDS

    def held_version(self, counted: int) -> int:
        """Return the version of the side that its memory is of, once it knows which of its answers counted."""
        if self.ready is None:
            return 0
        is_last = 0 < self.ready.last_round <= counted
        return self.ready.last_version if is_last else self.ready.kept_version

    def word(self, now: float) -> str:
        """Say in a word where it stands."""
        if self.is_withdrawn:
            return "withdrawn"
        if self.last_seen is None:
            return "never seen"
        if not self.is_near(now):
            return "away"
        if self.ready is None:
            return "loading"
        if self.ready.refusal is not None:
            return "refuses"
        return "training" if self.posted is not None else "ready"

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return this as plain values, for the round's record."""
        refusal = self.refusal
        return {
            "name": self.name,
            "state": self.word(now),
            "held_version": self.held,
            "seconds_since_seen": None if self.last_seen is None else round(now - self.last_seen, 1),
            "last_loss_nats": self.last_loss,
            "seconds": self.seconds,
            "rows": None if self.ready is None else self.ready.rows,
            "memory_lost": self.memory_lost,
            "left_out": self.left_out if refusal is None else policy.in_words(refusal),
        }

    def line(self, now: float) -> str:
        """Return the live line about it."""
        parts = [f"{self.name}: {self.word(now)}", f"holds version {self.held}"]
        if self.last_seen is not None:
            parts.append(f"seen {now - self.last_seen:.0f} s ago")
        if self.last_loss is not None:
            parts.append(f"loss {self.last_loss:.4f}")
        if self.epsilon is not None:
            parts.append(f"ε {self.epsilon:.2f}")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s")
        if self.memory_lost:
            parts.append("its optimiser's state is lost")
        why = self.left_out if self.refusal is None else policy.in_words(self.refusal)
        return ", ".join(parts) + (f"; left out: {why}" if why else "")
