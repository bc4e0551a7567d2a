"""An engine whose clients' private steps are booked before they are taken, and who stop at their budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.assembly.private_rounds import booking_of, budget_of, num_units_of
from fedloom.assembly.round_plan import SEED, Population, training_of
from fedloom.config import Settings
from fedloom.errors import PrivacyError
from fedloom.federation.intake import Arrival
from fedloom.federation.rounds import Engine
from fedloom.methods.state import Broadcast, Failure
from fedloom.privacy.ledger import LEDGER, Booking, Ledger


@dataclass
class PrivacyBooks:
    """A run's ledger, and what each client's rounds cost; draws are from the run's seed, so it is a simulation."""

    ledger: Ledger
    booking: Callable[[int, int], Booking]
    unit_column: str | None = None

    def book(self, client: int, round: int) -> None:
        """Book a client's round.

        Raises:
            PrivacyError: it would pass the budget.
        """
        self.ledger.book(self.booking(client, round))


@dataclass(frozen=True)
class BookedEngine:
    """An engine, asked for those clients only whose round is within their budget; the others fail with the reason."""

    engine: Engine
    books: PrivacyBooks

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Book, and train whoever may."""
        allowed = []
        for one in broadcasts:
            try:
                self.books.book(one.client, one.round)
            except PrivacyError as error:
                yield Arrival(Failure(one.client, str(error)), 0, 0)
            else:
                allowed.append(one)
        if allowed:
            yield from self.engine.train(allowed)


def books_of(settings: Settings, population: Population, folder: Path) -> PrivacyBooks | None:
    """Return a run's books, as far as they were kept; None where rows are not hidden.

    Raises:
        RunError: the ledger cannot be read.
    """
    if settings.privacy.unit != "row":
        return None
    training, units = training_of(settings), dict[int, int]()

    def booking(client: int, round: int) -> Booking:
        if client not in units:
            units[client] = num_units_of(population.rows_of(client))
        return booking_of(training, units[client], client, round)

    return PrivacyBooks(Ledger(folder / LEDGER, budget_of(settings)), booking, settings.data.unit_column)


def with_privacy(metrics: Mapping[str, Any], books: PrivacyBooks | None) -> dict[str, Any]:
    """Return a round's metrics with what it cost: of every client that was asked, and of whoever spent most so far."""
    if books is None:
        return dict(metrics)
    ledger = books.ledger
    clients = [{**client, "epsilon": ledger.epsilon(client["client"])} for client in metrics["clients"]]
    privacy = privacy_record([ledger.most()], ledger.budget.delta, SEED, books.unit_column)
    return {**metrics, "clients": clients, "privacy": privacy}


def privacy_record(
    spent: Sequence[float | None], delta: float, draws: str, unit_column: str | None = None
) -> dict[str, Any]:
    """Return a round's record of privacy: what whoever spent most has spent so far, as far as it is known.

    ``unit_column`` names what is hidden where that is not a row.
    """
    known = [cost for cost in spent if cost is not None]
    named = {} if unit_column is None else {"unit_column": unit_column}
    return {"unit": "row", **named, "epsilon": max(known, default=None), "delta": delta, "draws": draws}
