"""What comes back to the server in a round: each answer is checked, and used or left out with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from fedloom.errors import TooFewClientsError, UpdateError
from fedloom.federation.update_checks import check_update
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Work
from fedloom.methods.state import Broadcast, Failure, ServerState, Update
from fedloom.training.stats import TrainingStats

_NO_STATS = asdict(TrainingStats(0)) | {"loss_nats": None, "loss_last_nats": None}


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
        """A change this many times the last round's median norm is refused."""
        ...


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round; ``reason`` says why an update was left out, and is None where it was used."""

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
        return own | (asdict(self.stats) if self.stats is not None else _NO_STATS)


@dataclass
class Intake:
    """A round's arrivals: passes on usable updates one at a time and remembers why others were left out."""

    plan: IntakeRules
    work: Work
    state: ServerState
    broadcasts: Sequence[Broadcast]
    seen: dict[int, ClientRecord] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    _lost: str | None = None

    @property
    def norms(self) -> list[float]:
        """Norms of the changes that were used."""
        return [record.norm for record in self.seen.values() if record.reason is None and record.norm is not None]

    def usable(self, arrivals: Iterable[Arrival], keep: Callable[[Update], None]) -> Iterator[Update]:
        """Yield the updates that pass validation."""
        expected = {broadcast.client: broadcast for broadcast in self.broadcasts}
        for arrival in self._attributable(arrivals):
            client = arrival.outcome.client
            if client not in expected or client in self.seen:
                continue
            record = self._examine(arrival, expected[client])
            self.seen[client] = record
            self._note_held(arrival.outcome, expected[client])
            if record.reason is None and isinstance(arrival.outcome, Update):
                keep(arrival.outcome)
                yield arrival.outcome
        for client in expected.keys() - self.seen.keys():
            self.seen[client] = ClientRecord(client, self._lost or "returned nothing", 0, 0)
        self._require_enough()

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
        typical = self.state.typical_norm
        reason, change = None, None
        try:
            limit = None if typical is None else self.plan.max_norm_ratio * typical
            change = check_update(outcome, broadcast, self.work, self.plan.shapes, limit)
        except UpdateError as error:
            reason = str(error)
        is_read = isinstance(outcome, Update) and isinstance(outcome.adapter, Adapter)
        return ClientRecord(
            outcome.client,
            reason,
            *crossed,
            stats=outcome.stats if is_read and isinstance(outcome.stats, TrainingStats) else None,
            num_parameters=outcome.adapter.num_parameters if is_read else 0,
            norm=change,
        )

    def _note_held(self, outcome: Update | Failure, broadcast: Broadcast) -> None:
        """Believe a client that it holds the version it was just sent, or an older one; nothing else."""
        held = getattr(outcome, "held", None)
        if type(held) is int and 0 <= held <= broadcast.news.version:
            self.held[outcome.client] = held

    def _require_enough(self) -> None:
        used = len(self.norms)
        if used >= self.plan.min_clients:
            return
        reasons = "; ".join(f"client {r.client}: {r.reason}" for r in self.seen.values() if r.reason is not None)
        raise TooFewClientsError(
            f"round {self.state.round + 1}: expected usable updates from at least {self.plan.min_clients} clients "
            f"(federation.min_clients), got {used} ({reasons}); {advice_after(self.state.round)}"
        )


def advice_after(num_rounds_done: int) -> str:
    """Say how to go on where a round fails after ``num_rounds_done`` others."""
    if num_rounds_done == 0:
        return "mend the cause and run again"
    return (
        "earlier rounds are saved: where the cause has passed, run again to go on; other settings need another folder "
        "or a fresh start"
    )
