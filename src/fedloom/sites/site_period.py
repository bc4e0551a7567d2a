"""A period of split training at a site, as far as its connection goes: everything is done once and in order."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fedloom.sites.link import Frame
from fedloom.sites.split_frames import Begin, Updates

_ANSWERS_KEPT = 4
"""Answers that may be asked for again: of the micro-batches in flight, and one of the last blocks."""


@dataclass
class SitePeriod:
    """Which frame of the server is waited for, and the last answers in case one is lost.

    Attributes:
        begin: what began it.
        next: number of the frame that is waited for.
        is_at_work: whether steps are still to come.
        heard: when the last frame came.
    """

    begin: Begin
    next: int = 0
    is_at_work: bool = True
    heard: float = field(default_factory=time.monotonic)
    _answers: dict[int, Frame] = field(default_factory=dict)

    def take(self, number: int) -> tuple[bool, Frame | None]:
        """Return whether a frame is to be done now, and the answer to send again where it was done before."""
        self.heard = time.monotonic()
        if number != self.next:
            return False, self._answers.get(number)
        self.next += 1
        return True, None

    def answered(self, number: int, data: Frame) -> None:
        """Keep an answer for a while."""
        self._answers[number] = data
        for oldest in sorted(self._answers)[:-_ANSWERS_KEPT]:
            del self._answers[oldest]

    def book(self, head: Updates, sent: int) -> dict[str, object]:
        """Return the ledger's entry of a period that is complete."""
        self.is_at_work = False
        return {
            "run": head.run,
            "round": self.begin.round,
            "seconds": round(head.seconds, 3),
            "sent_bytes": sent,
        }
