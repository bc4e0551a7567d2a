"""The plain records that a round is made of: what is handed out, what comes back, what the server keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.lora.algebra import stack, total
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What client ``client`` receives at the start of round ``round``.

    ``news`` and ``start`` cross the wire. ``news`` extends the side adapter that the client holds from version
    ``since`` (0: from nothing) to version ``round - 1``; ``side`` is the result, the same for every client.
    ``start`` is what the client trains from, at its own rank: an adapter that is sent, or the name of a fresh draw.
    """

    round: int
    client: int
    rank: int
    scale: float
    side: Adapter
    news: Adapter
    since: int
    start: Adapter | Draw


@dataclass(frozen=True, eq=False)
class Update:
    """What a client sends back: the effective adapter it ended with, and what it was trained on."""

    round: int
    client: int
    adapter: Adapter
    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    num_steps: int
    loss_nats: float
    loss_last_nats: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A client that took part and has no usable update, and why."""

    client: int
    reason: str


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything the server carries from round to round; never changed, only replaced.

    Attributes:
        round: rounds completed, which is also the version of ``side``.
        side: what everybody adds to the frozen base.
        start: what clients continue from, at the largest rank; None when every round starts fresh.
        chain: the additions to ``side`` made by the latest rounds, newest last, for clients that hold an older one.
        seen: the version of ``side`` that each client that ever took part holds.
        velocity: the server step's memory.
        residual: what a lossy broadcast has not delivered yet (error feedback).
        own: each client's own adapter, where nothing is shared.
        typical_norm: median norm of the last round's updates, against which an absurd one is told.
    """

    round: int = 0
    side: Adapter = field(default_factory=Adapter)
    start: Adapter | None = None
    chain: tuple[Adapter, ...] = ()
    seen: Mapping[int, int] = field(default_factory=dict)
    velocity: Adapter = field(default_factory=Adapter)
    residual: Adapter = field(default_factory=Adapter)
    own: Mapping[int, Adapter] = field(default_factory=dict)
    typical_norm: float | None = None

    def global_adapter(self) -> Adapter:
        """Return all that training has added to the base, as one adapter."""
        return total([self.side, self.start or Adapter()])


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a strategy makes of a round's updates: the next start, and what joins the side besides.

    Attributes:
        start: the next ``ServerState.start``; None where every round starts fresh.
        side: what joins the side at the plain step: FLoRA's stack, the residual that a mean of factors misses,
            nothing where it is left out.
        ideal: ``Σ p_k s_k B_k A_k``, what the clients' products come to without noise.
        mean_squared_norm: ``Σ p_k ‖change of client k‖²``.
        weights: p_k of every client, summing to one.
        own: clients' own adapters, where nothing is shared.
    """

    start: Adapter | None
    side: Adapter
    ideal: Adapter
    mean_squared_norm: float
    weights: Mapping[int, float]
    own: Mapping[int, Adapter] = field(default_factory=dict)

    @property
    def applied(self) -> Adapter:
        """The product in place of the clients' products: start and side together."""
        return total([self.start or Adapter(), self.side])

    def change(self, previous: Adapter | None) -> Adapter:
        """Return the round's change of the global product from the start before."""
        if self.start is None:
            return self.side
        assert previous is not None
        return total([stack([self.start, previous], [1.0, -1.0]), self.side])
