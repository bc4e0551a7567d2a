"""The ledger of what was spent on whom: steps are booked before they are taken, so no crash forgets one.

Each line of ``privacy.jsonl`` is a round of one client: how many steps, of which rate and noise. Steps drawn from a
run's seed are the same when a round is repeated after a crash, and count once; those of a site never are, and count as
often as they were begun.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fedloom.errors import PrivacyError, RunError
from fedloom.privacy.accountant import PrivateStep, epsilon
from fedloom.run_folder import durable
from fedloom.wording import counted

LEDGER = "privacy.jsonl"
EVERYBODY = -1
"""In a client's place: steps that cost every client the same, drawn or not."""
_BEGIN = b'{"run":'
_RETRY = "free space or mend the disk; no step is taken that is not booked"


@dataclass(frozen=True)
class Budget:
    """What may be spent: at most ``max_epsilon`` at ``delta``, or without a limit."""

    delta: float
    max_epsilon: float | None = None


@dataclass(frozen=True)
class Booking:
    """A round's steps of a client in a run; ``draws`` says whether a repetition would draw the same."""

    run: str
    client: int
    round: int
    steps: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0.0, le=1.0)]
    noise_multiplier: Annotated[float, Field(ge=0.0)]
    draws: Literal["seed", "system"]

    @property
    def step(self) -> PrivateStep:
        """One of the steps."""
        return PrivateStep(self.rate, self.noise_multiplier)


_BOOKING = TypeAdapter(Booking)


class Ledger:
    """A file of bookings, and what they come to; ``budget`` is each client's.

    Raises:
        RunError: the file cannot be read.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        self._path, self.budget = path, budget
        self._booked: set[Booking] = set()
        self._spent: dict[tuple[int, str], Counter[PrivateStep]] = {}
        for one in _read(path):
            self._count(one)

    def book(self, one: Booking) -> float:
        """Book steps that are about to be taken, durably, and return ε with them.

        Raises:
            PrivacyError: they would pass the budget; nothing was booked.
            RunError: the disk refused.
        """
        if one.draws == "seed" and one in self._booked:
            return self.epsilon(one.client)
        after = self._spent_by(one.client)
        after[one.step] += one.steps
        cost, limit = epsilon(after, self.budget.delta), self.budget.max_epsilon
        if limit is not None and cost > limit:
            spent, who = self.epsilon(one.client), "every client" if one.client == EVERYBODY else f"client {one.client}"
            raise PrivacyError(
                f"{who}: expected at most privacy.max_epsilon = {limit:g} at delta = {self.budget.delta:g}, got "
                f"{cost:.4g} with {counted(one.steps, 'step')} of round {one.round} after {spent:.4g} so far; no such "
                "step is taken: raise max_epsilon or noise_multiplier in a new run"
            )
        with durable.explained(str(self._path), _RETRY):
            durable.append_line(self._path, asdict(one))
        self._count(one)
        return cost

    def epsilon(self, client: int, run: str | None = None) -> float:
        """Return what a client has spent so far, in all or in one run."""
        return epsilon(self._spent_by(client, run), self.budget.delta)

    def most(self) -> float:
        """Return what the client has spent that spent most."""
        return max((self.epsilon(client) for client in {client for client, _ in self._spent}), default=0.0)

    def _spent_by(self, client: int, run: str | None = None) -> Counter[PrivateStep]:
        found = [spent for (who, where), spent in self._spent.items() if who == client and run in (None, where)]
        return sum(found, Counter())

    def _count(self, one: Booking) -> None:
        self._booked.add(one)
        self._spent.setdefault((one.client, one.run), Counter())[one.step] += one.steps


def _read(path: Path) -> list[Booking]:
    """Return what was booked; a line that a crash cut off was of steps that were never taken."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise RunError(f"{path}: expected the ledger of privacy, got {error.strerror}; check its rights") from error
    return [_booking(path, number, line) for number, line in enumerate(lines, 1) if line and not _is_cut_off(line)]


def _is_cut_off(line: bytes) -> bool:
    """Tell whether a line is the beginning of a booking; whatever else cannot be read is damage."""
    return _BEGIN.startswith(line[: len(_BEGIN)]) and not line.endswith(b"}")


def _booking(path: Path, number: int, line: bytes) -> Booking:
    """Return a line's booking.

    Raises:
        RunError: it is none. A ledger that is read in part would forget what was spent.
    """
    try:
        return _BOOKING.validate_json(line, strict=True)
    except ValidationError as error:
        raise RunError(
            f"{path}, line {number}: expected a booking of this version, got another line; restore the file"
        ) from error
