"""What comes back to the server in a round: each answer is checked, and used or dropped with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from fedloom.errors import AdapterError, TooFewClientsError, UpdateError
from fedloom.lora.algebra import distance, norm
from fedloom.lora.initial import Draw
from fedloom.lora.layer import check_fits
from fedloom.methods.client_half import Payload, Work
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
        return own | (asdict(self.stats) if self.stats is not None else _NO_STATS)


@dataclass
class Intake:
    """A round's arrivals: passes on usable updates one at a time and remembers why others were dropped."""

    plan: IntakeRules
    work: Work
    state: ServerState
    broadcasts: Sequence[Broadcast]
    seen: dict[int, ClientRecord] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)

    @property
    def norms(self) -> list[float]:
        """Norms of the changes that were used."""
        return [record.norm for record in self.seen.values() if record.reason is None and record.norm is not None]

    def usable(self, arrivals: Iterable[Arrival], keep: Callable[[Update], None]) -> Iterator[Update]:
        """Yield the updates that pass validation."""
        expected = {broadcast.client: broadcast for broadcast in self.broadcasts}
        for arrival in arrivals:
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
            self.seen[client] = ClientRecord(client, "returned nothing", 0, 0)
        self._require_enough()

    def records(self, weights: Mapping[int, float]) -> tuple[ClientRecord, ...]:
        """Return one record per client in the order of the ids, with the weights the strategy gave."""
        return tuple(replace(self.seen[client], weight=weights.get(client, 0.0)) for client in sorted(self.seen))

    def _examine(self, arrival: Arrival, broadcast: Broadcast) -> ClientRecord:
        outcome = arrival.outcome
        crossed = (arrival.download_bytes, arrival.upload_bytes)
        if isinstance(outcome, Failure):
            return ClientRecord(outcome.client, outcome.reason, *crossed)
        typical = self.state.typical_norm
        reason, change = None, None
        try:
            limit = None if typical is None else self.plan.max_norm_ratio * typical
            change = check_update(outcome, broadcast, self.work, self.plan.shapes, limit)
        except UpdateError as error:
            reason = str(error)
        return ClientRecord(
            outcome.client,
            reason,
            *crossed,
            stats=outcome.stats,
            num_parameters=outcome.adapter.num_parameters,
            norm=change,
        )

    def _note_held(self, outcome: Update | Failure, broadcast: Broadcast) -> None:
        """Believe a client that it holds the version it was just sent, or an older one; nothing else."""
        if outcome.held is not None and 0 <= outcome.held <= broadcast.news.version:
            self.held[outcome.client] = outcome.held

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


def check_update(
    update: Update,
    broadcast: Broadcast,
    work: Work,
    shapes: Mapping[str, tuple[int, int]],
    norm_limit: float | None,
) -> float:
    """Return the norm of the client's change, or refuse the update; of a gradient, the norm of its factors.

    Raises:
        UpdateError: if it is for another round, has wrong modules, shapes or ranks, is not finite, did not move, was
            trained on nothing, or its change has a norm above ``norm_limit``.
    """
    if update.round != broadcast.round:
        raise UpdateError(
            f"expected an update for round {broadcast.round}, got one for round {update.round}; answer the current "
            "broadcast"
        )
    try:
        check_fits(update.adapter, shapes)
    except AdapterError as error:
        raise UpdateError(str(error)) from error
    wrong = {name: rank for name, rank in update.adapter.ranks.items() if rank != broadcast.rank}
    if wrong:
        name, rank = next(iter(wrong.items()))
        raise UpdateError(f"{name}: expected rank {broadcast.rank}, got {rank}; train at the rank of the broadcast")
    if not update.adapter.is_finite():
        raise UpdateError("expected finite numbers, got NaN or infinity; lower training.learning_rate")
    if update.stats.num_rows < 1:
        raise UpdateError(f"expected training on at least one row, got {update.stats.num_rows}; give the client rows")
    change = _change(update, broadcast, work)
    if change == 0.0:
        raise UpdateError(
            "expected the adapter to change during training, got the one sent out: check training.learning_rate and "
            "model.target_modules"
        )
    if norm_limit is not None and change > norm_limit:
        raise UpdateError(
            f"expected a change of norm {norm_limit:.3g} or less, got {change:.3g}; check its data, or raise "
            "federation.max_norm_ratio"
        )
    return change


def _change(update: Update, broadcast: Broadcast, work: Work) -> float:
    if update.change_norm is not None:
        return update.change_norm
    if work.payload is Payload.GRADIENT:
        return math.hypot(*(float(t.double().norm()) for t in update.adapter.as_tensors(work.sends).values()))
    if isinstance(broadcast.start, Draw):
        return norm(update.adapter)
    return distance(update.adapter, broadcast.start)
