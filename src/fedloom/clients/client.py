"""One client: it is sent bytes, trains, and answers in bytes. Nothing else reaches it.

It holds the side at a version and applies the news to it, and it keeps what its method's client half says: its own
factors, its optimiser's moments, what the wire has rounded off. An engine carries the messages; where many clients live
in one process, the engine lets them share the base and train in one pass between :meth:`Client.receive` and
:meth:`Client.answer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedloom.clients.held_sides import HeldSides
from fedloom.clients.memory import Memory, Tensors
from fedloom.data.tokens import TokenSet
from fedloom.errors import BehindError, FedloomError
from fedloom.federation.blob import WireDtype
from fedloom.federation.broadcasts import Received, decode_broadcast
from fedloom.federation.buffers import Buffer
from fedloom.federation.coding import rounded
from fedloom.federation.messages import answer_dtype, encode_failure, encode_update
from fedloom.lora.algebra import distance, slots_after, total, truncate
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import ClientHalf, Moments, Payload, Rounding, Work
from fedloom.methods.side import digest
from fedloom.methods.state import Failure, Update
from fedloom.training.cohort_round import ClientResult, ClientTask
from fedloom.training.control_variates import carried, correction_of
from fedloom.training.moments import Prior, moved_by

DIVERGED = "expected finite numbers, got NaN or infinity; lower training.learning_rate"


@dataclass(frozen=True, eq=False)
class Assignment:
    """What a client was asked and has prepared: the task, the side to train beside, and what its answer needs."""

    task: ClientTask
    side: Adapter
    work: Work
    round: int
    began_sha256: str = ""


@dataclass
class Client:
    """One client of a run.

    Attributes:
        number: its position in the population.
        half: the method's client half.
        shapes: (out, in) of the target modules of its base.
        rows: its rows, read when it is first asked.
        sides: the sides held on its machine.
        memory: what it keeps between rounds.
    """

    number: int
    half: ClientHalf
    shapes: Mapping[str, tuple[int, int]]
    seed: int
    rows: Callable[[], TokenSet]
    sides: HeldSides
    memory: Memory = field(default_factory=Memory)

    def handle(self, message: bytes, train: Callable[[Assignment], ClientResult], dtype: WireDtype) -> bytes:
        """Answer a broadcast: bytes in, bytes out. What goes wrong is this client's failure, sent as such."""
        try:
            assignment = self.receive(message)
            return self.answer(assignment, train(assignment), dtype)
        except FedloomError as error:
            return self.refuse(error)

    def receive(self, message: Buffer) -> Assignment:
        """Read a broadcast and catch up with it.

        Raises:
            UpdateError: if the message is damaged or of another base.
            BehindError: if its news do not fit the side that this client holds.
        """
        return self.prepare(decode_broadcast(message, self.shapes))

    def prepare(self, received: Received) -> Assignment:
        """Apply the news, and make a task of the start and of what this client keeps."""
        side = self.sides.caught_up(self.memory.version, received.news)
        work, whole = self.half.work(received.round), self._start_of(received)
        # Together, and before the training: whoever holds a version is not sent again what led to it.
        shares, before = work.moments is Moments.SHARED, self.memory
        held = whole.as_tensors() if received.is_kept or shares else {}
        since = {"round": torch.tensor(received.round)} if shares else before.moments
        self.memory = replace(before, version=received.news.version, start=held, moments=since)
        start, beyond = truncate(whole, received.rank), slots_after(whole, received.rank)
        moments = self.memory.moments if work.moments is Moments.OWN and self.memory.moments else None
        task = ClientTask(
            client=self.number,
            rows=self.rows(),
            rank=received.rank,
            scale=received.scale,
            start=start.with_factors(self.memory.own),
            optimiser_state=moments,
            trains=work.trains,
            measures_gradient=work.is_gradient,
            sketches=work.payload is Payload.SKETCH,
            keeps_moments=work.moments is Moments.OWN,
            shares_moments=shares,
            prior=_prior(received, whole, before, work.prior_steps) if shares else None,
            correction=correction_of(received.control, before.control) if work.corrects else {},
        )
        began = digest(whole) if received.is_coded and received.is_kept else ""
        return Assignment(task, total([side, beyond]) if beyond else side, work, received.round, began)

    def answer(self, assignment: Assignment, result: ClientResult, dtype: WireDtype) -> bytes:
        """Return an update in bytes, and keep what is this client's own."""
        outcome, tensors = self.conclude(assignment, result, dtype)
        if isinstance(outcome, Failure):
            return encode_failure(outcome)
        return encode_update(outcome, tensors, answer_dtype(assignment.work, dtype))

    def conclude(
        self, assignment: Assignment, result: ClientResult, dtype: WireDtype
    ) -> tuple[Update | Failure, Tensors]:
        """Return the update and the tensors of it that cross; a training that diverged leaves the memory as it was."""
        if not (result.stats.is_finite and result.adapter.is_finite()):
            return Failure(self.number, DIVERGED, self.memory.version), {}
        work, start = assignment.work, assignment.task.start
        tensors = _payload(work, start, result)
        owed: Tensors = {}
        if work.rounding is Rounding.OWED:
            tensors = {key: tensor + self.memory.owed.get(key, 0.0) for key, tensor in tensors.items()}
            seen = rounded(tensors, dtype)
            owed = {key: tensor - seen[key] for key, tensor in tensors.items()}
        self.memory = replace(
            self.memory,
            own=result.adapter.as_tensors(work.keeps),
            moments=self.memory.moments if work.moments is Moments.SHARED else result.optimiser_state or {},
            owed=owed,
            control=_control(work, assignment.task, result),
        )
        moved = None if work.sends else distance(result.adapter, start)
        update = Update(
            assignment.round,
            self.number,
            result.adapter,
            result.stats,
            self.memory.version,
            moved,
            began_sha256=assignment.began_sha256,
            moments=result.moments,
        )
        return update, tensors

    def refuse(self, error: FedloomError) -> bytes:
        """Return a failure in bytes, with the version that this client holds."""
        return encode_failure(self.failure(error))

    def failure(self, error: FedloomError) -> Failure:
        """Return what went wrong, with the version that this client holds."""
        held = error.held if isinstance(error, BehindError) else self.memory.version
        return Failure(self.number, str(error), held)

    def _start_of(self, received: Received) -> Adapter:
        """Return where to begin: what is drawn or was sent, completed by or added to what is held.

        Raises:
            BehindError: what was sent is the difference to another start than this client holds.
        """
        if received.draw is not None:
            return received.draw.adapter(self.shapes, received.rank, self.seed)
        if received.holds is None and received.origin is None:
            return Adapter.from_tensors(received.sent)
        held = Adapter.from_tensors(self.memory.start)
        if received.holds == "" or (received.holds is None and not held):
            assert received.origin is not None
            held = received.origin.adapter(self.shapes, received.start_rank, self.seed)
        if received.holds is None:
            return held.with_factors(received.sent)
        if received.holds and received.holds != (found := digest(held)):
            raise BehindError(
                self.memory.version,
                f"it holds a start with hash {found[:12] or 'none'}, the difference is to {received.holds[:12]}",
            )
        before = held.as_tensors()
        return held.with_factors({key: before[key] + step for key, step in received.sent.items()})


def _prior(received: Received, start: Adapter, before: Memory, num_steps: int) -> Prior | None:
    """Return what the shared moments say, with the move since this client last took part, of a round on average."""
    if not received.moments:
        return None
    last, rank = before.moments.get("round"), received.rank
    if not before.start or last is None or int(last) >= received.round:
        return Prior(received.moments, None, num_steps)
    old = truncate(Adapter.from_tensors(before.start), rank)
    return Prior(received.moments, moved_by(truncate(start, rank), old, received.round - int(last)), num_steps)


def _control(work: Work, task: ClientTask, result: ClientResult) -> dict[str, Tensor]:
    """Return what corrects this client's steps the next time."""
    if not work.corrects:
        return {}
    start, end = (adapter.as_tensors(work.sends) for adapter in (task.start, result.adapter))
    return carried(start, end, task.correction)


def _payload(work: Work, start: Adapter, result: ClientResult) -> dict[str, Tensor]:
    """Return the tensors that cross."""
    match work.payload:
        case Payload.FACTORS:
            return result.adapter.as_tensors(work.sends)
        case Payload.CHANGE:
            before, after = start.as_tensors(work.sends), result.adapter.as_tensors(work.sends)
            return {key: after[key] - before[key] for key in after}
        case Payload.GRADIENT | Payload.SKETCH:
            assert result.gradient is not None
            return result.gradient.as_tensors(work.sends)
