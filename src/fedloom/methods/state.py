"""The plain records that a round is made of: what is handed out, what comes back, what the server keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedloom.lora.algebra import stack, total, truncate
from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter, Factors
from fedloom.training.stats import TrainingStats


@dataclass(frozen=True, eq=False)
class News:
    """The way from the side that a client holds to the present one.

    Attributes:
        since: the version that ``parts`` go on from.
        version: the version they lead to, rounds completed.
        parts: the additions of rounds ``since + 1`` to ``version`` in order; or, where ``is_whole``, the side itself.
        sha256: of the side at ``version`` (``methods.side.digest``).
    """

    since: int = 0
    version: int = 0
    parts: tuple[Adapter, ...] = ()
    is_whole: bool = False
    sha256: str = ""


@dataclass(frozen=True, eq=False)
class Difference:
    """The way from the start that a client holds to a new one, of which a few bits a number cross.

    Attributes:
        since: hash of the start that it is to be added to; empty for the draw that every client makes by itself.
        step: the difference, as the wire rounds it.
        after: the start that it leads to: what the client holds then, and trains from.
    """

    since: str
    step: Adapter
    after: Adapter


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What client ``client`` is sent at the start of round ``round``.

    ``start`` is what it trains from: an adapter, or the name of a fresh draw. It may have slots beyond the client's
    ``rank``; those it leaves as they are. Of an adapter the factors in ``crossing`` cross; the others the client holds
    already, or draws from ``origin`` where it holds none. With a ``difference`` that is what crosses in the start's
    place, and the client trains from where it leads. ``moments`` are those that clients share, of the client's slots;
    ``control`` says how far a round carries all clients on average, where that corrects their steps.
    """

    round: int
    client: int
    rank: int
    scale: float
    news: News
    start: Adapter | Draw
    crossing: Factors = BOTH
    origin: Draw | None = None
    difference: Difference | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def trained(self) -> Adapter | Draw:
        """The slots of the start that the client trains."""
        return self.start if isinstance(self.start, Draw) else truncate(self.start, self.rank)


@dataclass(frozen=True, eq=False)
class Update:
    """What a client sends back.

    Attributes:
        adapter: the effective adapter it ended with; a factor that does not cross is the one it was sent. Where the
            client half sends gradients, the gradient with respect to the effective factors, zero where none crosses.
        stats: its own counts of its training.
        held: the version of the side that it now holds.
        change_norm: norm of the change of its product, by its own count; only where nothing crosses.
        began_sha256: of the start that it says it holds, where starts cross as differences.
        moments: means of its second moments (``training.moments``), where clients share them.
        weight: what the server lets it weigh where that is another than its rows, tokens or norm give (never sent).
    """

    round: int
    client: int
    adapter: Adapter
    stats: TrainingStats
    held: int = 0
    change_norm: float | None = None
    weight: float | None = None
    began_sha256: str = ""
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that took part and has no usable update, why, and the version it says it holds, where it said so."""

    client: int
    reason: str
    held: int | None = None


@dataclass(frozen=True, eq=False)
class StepMemory:
    """What a server step remembers.

    Attributes:
        velocity: a mean or sum of the changes.
        moments: means of their squares, by name, float64.
    """

    velocity: Adapter = field(default_factory=Adapter)
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything the server carries from round to round; never changed, only replaced.

    Attributes:
        round: rounds completed, which is also the version of ``side``.
        side: what every client adds to the frozen base.
        start: what clients continue from, at the largest rank; None when every round starts fresh.
        chain: the additions to ``side`` made by the latest rounds, newest last, for clients that hold an older one.
        seen: the version of ``side`` that each client said it holds.
        velocity, moments: the server step's memory.
        residual: what a lossy broadcast has not delivered yet (error feedback).
        typical_norm: median norm of the last round's updates, by which an absurd one is recognised.
        views: the start that each client holds, of those of which it is known; where starts cross as differences.
        optimiser: what the server's optimiser keeps (``ClientOptimiser.export_state``), where it has one, or the second
            moments that clients share.
        control: how far a round carries all clients on average (``training.control_variates``).
    """

    round: int = 0
    side: Adapter = field(default_factory=Adapter)
    start: Adapter | None = None
    chain: tuple[Adapter, ...] = ()
    seen: Mapping[int, int] = field(default_factory=dict)
    velocity: Adapter = field(default_factory=Adapter)
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Adapter = field(default_factory=Adapter)
    typical_norm: float | None = None
    views: Mapping[int, Adapter] = field(default_factory=dict)
    optimiser: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)

    def global_adapter(self) -> Adapter:
        """Return all that training has added to the base, as one adapter."""
        parts = [part for part in (self.side, self.start) if part]
        # Stacked even where it is one part: a copy in one memory layout, on which later rounding depends.
        return stack(parts, [1.0] * len(parts)) if parts else Adapter()


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
        optimiser, control: the next state's.
    """

    start: Adapter | None
    side: Adapter
    ideal: Adapter
    mean_squared_norm: float
    weights: Mapping[int, float]
    optimiser: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)

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


@dataclass(frozen=True, eq=False)
class Standing:
    """The model as a completed round left it: one adapter for all, or each client's own."""

    round: int
    shared: Adapter = field(default_factory=Adapter)
    own: Mapping[int, Adapter] = field(default_factory=dict)
