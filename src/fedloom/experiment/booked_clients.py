"""Rounds that hide whole clients: each is booked before anybody is asked, and no round passes the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.assembly.private_rounds import budget_of, client_bookings, is_amplified, rounds_within_budget
from fedloom.assembly.round_plan import Drawn
from fedloom.config import Settings
from fedloom.federation.rounds import RoundPlan
from fedloom.privacy.ledger import EVERYBODY, LEDGER, Ledger
from fedloom.reporting.progress import Progress


@dataclass(frozen=True)
class ClientBooks:
    """A run's ledger of its clients; ``draws`` says whether its noise is the run's seed's."""

    settings: Settings
    ledger: Ledger
    draws: Drawn

    def booked(self, plan: RoundPlan) -> RoundPlan:
        """Return a plan whose rounds are booked as their clients are drawn, before anybody is asked."""

        def sample(round: int) -> list[int]:
            cohort = plan.sample(round)
            for one in client_bookings(self.settings, cohort, round, self.draws):
                self.ledger.book(one)
            return cohort

        return replace(plan, sample=sample)

    def told(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return a round's metrics with what was spent so far: by those that were asked, and by whoever spent most."""
        amplified, ledger = is_amplified(self.settings), self.ledger
        clients = [
            {**client, "epsilon": ledger.epsilon(EVERYBODY if amplified else client["client"])}
            for client in metrics["clients"]
        ]
        privacy = {
            "unit": "client",
            "epsilon": ledger.most(),
            "delta": ledger.budget.delta,
            "draws": self.draws,
            "amplified": amplified,
        }
        if self.settings.privacy.noise == "clients":
            privacy["noise"] = "clients"
        return {**metrics, "clients": clients, "privacy": privacy}


def client_books_of(settings: Settings, folder: Path, draws: Drawn) -> ClientBooks | None:
    """Return a run's books, as far as they were kept; None where whole clients are not hidden.

    Raises:
        RunError: the ledger cannot be read.
    """
    if settings.privacy.unit != "client":
        return None
    return ClientBooks(settings, Ledger(folder / LEDGER, budget_of(settings)), draws)


def within_budget(settings: Settings, plan: RoundPlan, progress: Progress) -> RoundPlan:
    """Return the plan of as many rounds as the budget of hidden clients is enough for, and say so where it is fewer.

    Raises:
        PrivacyError: it is not enough for one.
    """
    if settings.privacy.unit != "client" or (allowed := rounds_within_budget(settings, plan)) == plan.num_rounds:
        return plan
    progress.note(
        f"privacy.max_epsilon = {settings.privacy.max_epsilon:g} is enough for {allowed} of {plan.num_rounds} rounds: "
        f"the run ends after round {allowed}"
    )
    return replace(plan, num_rounds=allowed)
