"""FedSA-LoRA: clients train both factors and share ``A`` alone; every ``B`` stays with its client.

    A ← Σ p_k A_k,   client k goes on from (B_k, A)

The result is one adapter per client: its own ``B`` over the mean ``A``. Half of FedIT's bytes or less cross.

Source: FedSA-LoRA (arXiv 2410.01463), section 3.2. Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter
from fedloom.methods.client_half import ClientHalf, EveryRound, Work
from fedloom.methods.state import Aggregate, ServerState
from fedloom.methods.sums import FactorSum
from fedloom.methods.zero_padding import ZeroPadding

A, B = frozenset("a"), frozenset("b")


@dataclass(frozen=True)
class FedSALoRA(ZeroPadding):
    """The mean of the clients' ``A``; the server's ``B`` is the drawn one, zero, and stays."""

    name: str = "fedsa-lora"

    @property
    def client(self) -> ClientHalf:
        """Train both factors, send ``A``, keep ``B``."""
        return EveryRound(Work(trains=BOTH, sends=A, keeps=B))

    @property
    def origin(self) -> Draw:
        """The draw of the first adapter, which every client makes by itself."""
        return self.drawn

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        """Average ``A``; no product is known here, so there is no ideal to be far from."""
        return replace(super().finish(state, sums), ideal=Adapter())
