"""FFA-LoRA: ``A`` is drawn once, shared and frozen; clients train and send ``B`` alone.

    B ← Σ p_k [B_k, 0],   A stays,   so B A = Σ p_k B_k A_k exactly, at any ranks

A client of rank r_k uses the first r_k rows of A. Half of FedIT's bytes or less cross: all clients draw A from the
run's seed, so it is never sent.

Source: FFA-LoRA (arXiv 2403.12313), section 3. Deviation: ranks may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.lora.initial import Draw
from fedloom.methods.client_half import ClientHalf, EveryRound, Work
from fedloom.methods.zero_padding import ZeroPadding

B = frozenset("b")


@dataclass(frozen=True)
class FFALoRA(ZeroPadding):
    """The mean of the clients' ``B`` over one shared, frozen ``A``."""

    name: str = "ffa-lora"

    @property
    def client(self) -> ClientHalf:
        """Train and send ``B``."""
        return EveryRound(Work(trains=B, sends=B))

    @property
    def origin(self) -> Draw:
        """The draw of the one ``A``, which every client makes by itself."""
        return self.drawn
