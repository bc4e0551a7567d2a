"""RoLoRA: clients train and send ``B`` in odd rounds and ``A`` in even ones; the factor at rest is the same for all.

    odd:  B ← Σ p_k B_k,  A stays;   even:  A ← Σ p_k A_k,  B stays;   so B A = Σ p_k B_k A_k exactly in every round

``B`` goes first, since it starts at zero and ``A`` has no gradient until it has moved. Only what has changed since a
client took part crosses: one factor where it took part in the last round, both after a longer absence.

Source: RoLoRA (arXiv 2502.01755), algorithm 1. Deviation: ranks may differ (padded with zeros, exact as well).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.lora.initial import Draw
from fedloom.methods.client_half import ClientHalf, Work
from fedloom.methods.zero_padding import ZeroPadding

A, B = frozenset("a"), frozenset("b")


class Alternating:
    """``B`` in odd rounds, ``A`` in even ones."""

    def work(self, round: int) -> Work:
        """Return a client's part of a round."""
        active = B if round % 2 else A
        return Work(trains=active, sends=active)


@dataclass(frozen=True)
class RoLoRA(ZeroPadding):
    """The mean of the factor that this round trains."""

    name: str = "rolora"

    @property
    def client(self) -> ClientHalf:
        """Train and send one factor, by turns."""
        return Alternating()

    @property
    def origin(self) -> Draw:
        """The draw of the first adapter, which every client makes by itself."""
        return self.drawn
