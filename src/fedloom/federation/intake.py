"""What comes back to the server in a round: each answer is checked, and used or dropped with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from statistics import median_low
from typing import Any, Protocol

from fedloom.errors import TooFewClientsError, UpdateError
from fedloom.federation.robust import Robust, RobustRule, judge
from fedloom.federation.update_checks import Asked, check_update, factor_norms
from fedloom.federation.waiting import Waiting
from fedloom.federation.weights import capped
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Work
from fedloom.methods.state import Broadcast, Failure, ServerState, Update
from fedloom.methods.strategy import Strategy, Weighting, weigh
from fedloom.training.stats import TrainingStats

_NO_LOSS = {"loss_nats": None, "loss_last_nats": None}
_NO_STATS = asdict(TrainingStats(0)) | _NO_LOSS


@dataclass(frozen=True, eq=False)
class Arrival:
    """What came back from one client, and the bytes of the two messages."""

    outcome: Update | Failure
    download_bytes: int
    upload_bytes: int


class IntakeRules(Protocol):
    """What an update is checked against."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every target module."""
        ...

    @property
    def min_clients(self) -> int:
        """Usable updates without which the run ends."""
        ...

    @property
    def max_norm_ratio(self) -> float:
        """A change this many times the median norm is refused."""
        ...

    @property
    def max_weight(self) -> float:
        """Largest share of one client."""
        ...

    @property
    def robust(self) -> RobustRule:
        """The rule by which few hostile updates cannot decide."""
        ...

    @property
    def strategy(self) -> Strategy:
        """What aggregates, and weighs clients."""
        ...

    def asked(self, client: int) -> Asked:
        """Return what a client's counts are held against."""
        ...


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round; ``reason`` says why an update was dropped, and is None where it was used."""

    client: int
    reason: str | None
    download_bytes: int
    upload_bytes: int
    stats: TrainingStats | None = None
    num_parameters: int = 0
    norm: float | None = None
    weight: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values, the client's counts beside the others."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stats"}
        if self.stats is None:
            return own | _NO_STATS
        return own | asdict(self.stats) | ({} if self.stats.tells_loss else _NO_LOSS)


@dataclass
class Intake:
    """A round's arrivals: passes on usable updates one at a time and remembers why others were left out.

    ``trusted`` are no clients: the server's own part, where it has one, is held against nothing.
    """

    plan: IntakeRules
    work: Work
    state: ServerState
    broadcasts: Sequence[Broadcast]
    seen: dict[int, ClientRecord] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    began: dict[int, str] = field(default_factory=dict)
    trusted: Collection[int] = ()
    _factor_norms: dict[int, dict[str, float]] = field(default_factory=dict)
    _weights: dict[int, float] = field(default_factory=dict)
    _moment_sizes: dict[int, float] = field(default_factory=dict)
    _by_work: dict[int, float] = field(default_factory=dict)
    _altered: set[int] = field(default_factory=set)
    _lost: str | None = None

    @property
    def norms(self) -> list[float]:
        """Norms of the changes that were used."""
        return [record.norm for record in self.seen.values() if record.reason is None and record.norm is not None]

    def usable(self, arrivals: Iterable[Arrival], keep: Callable[[Update], None]) -> Iterator[Update]:
        """Yield the updates that pass, in the order of their arrival, once all have been seen and compared."""
        expected = {broadcast.client: broadcast for broadcast in self.broadcasts}
        with Waiting() as waiting:
            for arrival in self._attributable(arrivals):
                outcome = arrival.outcome
                if outcome.client not in expected or outcome.client in self.seen:
                    continue
                self.seen[outcome.client] = self._examine(arrival, expected[outcome.client])
                self._note_held(outcome, expected[outcome.client])
                if isinstance(outcome, Update) and self.seen[outcome.client].reason is None:
                    waiting.put(self._weighed(outcome))
            for client in expected.keys() - self.seen.keys():
                self.seen[client] = ClientRecord(client, self._lost or "returned nothing", 0, 0)
            self._refuse_far_off()
            used = self._judged(expected, waiting)
            self._require_enough()
            weights = self._capped_weights()
            for update in used:
                if self.seen[update.client].reason is None:
                    keep(update)
                    yield replace(update, weight=weights.get(update.client))

    def records(self, weights: Mapping[int, float]) -> tuple[ClientRecord, ...]:
        """Return one record per client in the order of the ids, with the weights the strategy gave."""
        return tuple(replace(self.seen[client], weight=weights.get(client, 0.0)) for client in sorted(self.seen))

    def _attributable(self, arrivals: Iterable[Any]) -> Iterator[Arrival]:
        """Yield what says whose it is; where a message ends the engine's round, what came before it stands."""
        try:
            for arrival in arrivals:
                client = getattr(getattr(arrival, "outcome", None), "client", None)
                if isinstance(arrival, Arrival) and type(client) is int:
                    yield arrival
        except UpdateError as error:
            self._lost = f"returned nothing: {error}"

    def _examine(self, arrival: Arrival, broadcast: Broadcast) -> ClientRecord:
        outcome = arrival.outcome
        crossed = (arrival.download_bytes, arrival.upload_bytes)
        if isinstance(outcome, Failure):
            return ClientRecord(outcome.client, str(outcome.reason), *crossed)
        reason, change, stats = None, None, None
        try:
            asked = None if broadcast.client in self.trusted else self.plan.asked(broadcast.client)
            change = check_update(outcome, broadcast, self.work, self.plan.shapes, asked)
            stats = outcome.stats
            self._factor_norms[outcome.client] = factor_norms(outcome, self.work)
            if outcome.moments:
                self._moment_sizes[outcome.client] = math.sqrt(sum(float(t.sum()) for t in outcome.moments.values()))
            if self.plan.strategy.weighting is Weighting.WORK:
                self._by_work[outcome.client] = float(self.plan.asked(outcome.client).work)
            self._weights[outcome.client] = weigh(self._weighed(outcome), self.plan.strategy.weighting)
        except UpdateError as error:
            reason = str(error)
        is_read = isinstance(outcome, Update) and isinstance(outcome.adapter, Adapter)
        size = outcome.adapter.num_parameters if is_read else 0
        return ClientRecord(outcome.client, reason, *crossed, stats=stats, num_parameters=size, norm=change)

    def _weighed(self, update: Update) -> Update:
        """Return an update with the weight that the server gives by work; by anything else the update itself tells."""
        return replace(update, weight=self._by_work.get(update.client))

    def _refuse_far_off(self) -> None:
        """Leave out changes, and factors, of a norm that no training gives: many times what others' have.

        Changes are held against the last round's median, in the first round and where nothing was used before against
        this one's; factors against this round's, so that a factor 1,000 times as large beside one a thousandth as
        large, whose product looks like any other, does not decide a mean of factors. Of an even number of updates the
        lower median counts: of two, the larger one is the one in doubt.
        """
        if math.isinf(self.plan.max_norm_ratio):
            return
        typical = self.state.typical_norm
        changes = {c: record.norm for c, record in self.seen.items() if record.reason is None and record.norm}
        self._refuse_above("a change", changes, typical if typical is not None else _lower_median(changes.values()))
        sizes = {c: size for c, size in self._moment_sizes.items() if self.seen[c].reason is None}
        self._refuse_above("second moments", sizes, _lower_median(sizes.values()))
        for factor in sorted(self.work.sends):
            norms = {c: n[factor] for c, n in self._factor_norms.items() if n and self.seen[c].reason is None}
            self._refuse_above(f"factors {factor}", norms, _lower_median(norms.values()))

    def _judged(self, expected: Mapping[int, Broadcast], waiting: Iterable[Update]) -> Iterable[Update]:
        """Apply the robust rule, for which all updates are in memory at once; without one they go on waiting."""
        if self.plan.robust.kind is Robust.NONE:
            return waiting
        updates = [update for update in waiting if self.seen[update.client].reason is None]
        by_strategy = partial(weigh, weighting=self.plan.strategy.weighting)
        verdict = judge(self.plan.robust, updates, expected, self.work, by_strategy, self.trusted)
        for client, reason in verdict.left_out.items():
            self.seen[client] = replace(self.seen[client], reason=reason)
        self._altered = {c for c, weight in verdict.weights.items() if weight != self._weights[c]}
        self._weights |= verdict.weights
        return list(verdict.updates.values())

    def _refuse_above(self, what: str, norms: Mapping[int, float], typical: float) -> None:
        limit = self.plan.max_norm_ratio * typical
        for client, norm in norms.items():
            if norm > limit > 0.0 and client not in self.trusted:
                reason = (
                    f"expected {what} of norm {limit:.3g} or less (federation.max_norm_ratio), got {norm:.3g}; lower "
                    "training.learning_rate where the client is honest"
                )
                self.seen[client] = replace(self.seen[client], reason=reason)

    def _capped_weights(self) -> dict[int, float]:
        """Return the weights of this round where they are others than the clients' rows, tokens or norms give."""
        weights = {c: weight for c, weight in self._weights.items() if self.seen[c].reason is None}
        shared = capped(weights, self.plan.max_weight, self.trusted)
        return shared if shared != weights or self._altered or self._by_work else {}

    def _note_held(self, outcome: Update | Failure, broadcast: Broadcast) -> None:
        """Believe a client that it holds the version it was just sent, or an older one; nothing else."""
        held = getattr(outcome, "held", None)
        if type(held) is int and 0 <= held <= broadcast.news.version:
            self.held[outcome.client] = held
        if isinstance(outcome, Update) and isinstance(outcome.began_sha256, str):
            self.began[outcome.client] = outcome.began_sha256

    def _require_enough(self) -> None:
        used = len(self.norms)
        if used >= self.plan.min_clients:
            return
        reasons = "; ".join(f"client {r.client}: {r.reason}" for r in self.seen.values() if r.reason is not None)
        raise TooFewClientsError(
            f"round {self.state.round + 1}: expected usable updates from at least {self.plan.min_clients} clients "
            f"(federation.min_clients), got {used} ({reasons}); {advice_after(self.state.round)}"
        )


def _lower_median(norms: Iterable[float]) -> float:
    return median_low(list(norms) or [0.0])


def advice_after(num_rounds_done: int) -> str:
    """Say how to go on where a round fails after ``num_rounds_done`` others."""
    if num_rounds_done == 0:
        return "mend the cause and run again"
    return (
        "earlier rounds are saved: where the cause has passed, run again to go on; other settings need another folder "
        "or a fresh start"
    )
