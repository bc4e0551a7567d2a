"""What a split run is made of: plan, segments, server, clients, and the rules by which adapters are aggregated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedloom.federation.server import ServerRules
from fedloom.lora.initial import fresh_adapter
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.split.client_seam import SplitClients
from fedloom.split.plan import SERVER, Segment, SplitPlan
from fedloom.split.server_half import SplitServer
from fedloom.split.split_state import SplitState

MakeStrategy = Callable[[Cohort], Strategy]
"""From the modules and ranks of a segment."""


@dataclass(frozen=True)
class SplitParties:
    """What a split run is made of: the plan, the segments of the clients' modules, the server and the clients.

    ``open_slots`` makes room for the adapters of the parties in this process at the start of every period, given its
    cohort: the clients' in its order, the server's last. Whoever evaluated in between may have used the model.
    """

    plan: SplitPlan
    segments: Sequence[Segment]
    server_shapes: Mapping[str, tuple[int, int]]
    server: SplitServer
    clients: SplitClients
    make_strategy: MakeStrategy
    rules: ServerRules
    open_slots: Callable[[Sequence[int]], None]

    @property
    def ranks(self) -> dict[int, int]:
        """Rank by owner."""
        return {owner: self.rank_of(owner) for owner in (SERVER, *range(self.plan.num_clients))}

    @property
    def scales(self) -> dict[int, float]:
        """Scale by owner."""
        return {owner: self.scale_of(owner) for owner in (SERVER, *range(self.plan.num_clients))}

    def rank_of(self, owner: int) -> int:
        """Return the rank of a client's or the server's adapter."""
        return self.plan.server_rank if owner == SERVER else self.plan.ranks[owner]

    def scale_of(self, owner: int) -> float:
        """Return the scale of a client's or the server's adapter."""
        return self.plan.server_scale if owner == SERVER else self.plan.scales[owner]

    def strategy(self, segment: Segment) -> Strategy:
        """Return the strategy that aggregates a segment."""
        highest = max(self.rank_of(owner) for owner in segment.owners)
        return self.make_strategy(Cohort(segment.shapes, highest, self.rank_of, self.plan.seed))

    def initial(self) -> SplitState:
        """Return the state before the first step."""
        server = fresh_adapter(self.server_shapes, self.plan.server_rank, self.plan.seed, "server")
        return SplitState(0, tuple(self.strategy(segment).initial() for segment in self.segments), server)
