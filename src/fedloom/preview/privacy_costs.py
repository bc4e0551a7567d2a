"""What a recipe's plan will cost each client in privacy before it is run, and which noise would meet its budget."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloom.assembly.preparation import Preparation
from fedloom.assembly.private_rounds import booking_of, num_units_of
from fedloom.assembly.round_plan import training_of
from fedloom.config import Settings
from fedloom.errors import FedloomError
from fedloom.federation.rounds import RoundPlan
from fedloom.preview.client_privacy import PlannedClients, planned_clients
from fedloom.preview.rehearsal import SketchWorkshop
from fedloom.privacy.accountant import PrivateStep, epsilon_at_most, noise_multiplier_for
from fedloom.training.private_rows import sampling_rate

LISTED = 100
"""Clients that have a line each."""


@dataclass(frozen=True)
class ClientCost:
    """What a run costs a client: its units, the rounds that it is drawn for, its steps in all, and ε; and its rows."""

    name: str
    num_units: int
    rounds: int
    steps: int
    epsilon: float
    num_rows: int


@dataclass(frozen=True)
class PlannedPrivacy:
    """What a run costs its clients; ``enough_noise`` is the multiplier with which all stay within the budget.

    ``unit_column`` names what is hidden where that is not a row. ``unknown`` says why it cannot be told; then no client
    is listed.
    """

    delta: float
    max_epsilon: float | None
    clients: tuple[ClientCost, ...] = ()
    enough_noise: float | None = None
    unknown: str | None = None
    unit_column: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return it for people."""
        if self.unknown is not None:
            return [f"privacy: what the run costs is not known: {self.unknown}"]
        width = max(6, *(len(one.name) for one in self.clients))
        column = self.unit_column
        what, counted, of_rows = "every row is hidden", "rows", ""
        if column is not None:
            what = f"every {column} is hidden with all its rows at a client"
            counted, of_rows = "units", f"  {'rows':>8}"
        lines = [
            f"privacy: {what}; what the whole run costs each client, at δ = {self.delta:g}:",
            f"{'client':>{width}}  {counted:>8}{of_rows}  {'rounds':>6}  {'steps':>8}  {'ε':>8}",
        ]
        shown = sorted(self.clients, key=lambda one: -one.epsilon)[:LISTED]
        shown = [one for one in self.clients if one in shown]
        lines += [
            f"{one.name:>{width}}  {one.num_units:>8,}{f'  {one.num_rows:>8,}' if of_rows else ''}"
            f"  {one.rounds:>6,}  {one.steps:>8,}  {one.epsilon:>8.3f}"
            for one in shown
        ]
        if (hidden := len(self.clients) - len(shown)) > 0:
            lines.append(f"and {hidden:,} clients that it costs no more")
        limit = self.max_epsilon
        if limit is not None and (beyond := [one.name for one in self.clients if one.epsilon > limit]):
            lines.append(
                f"privacy.max_epsilon = {limit:g} stops {len(beyond)} of {len(self.clients)} clients before the end; "
                f"with privacy.noise_multiplier = {self.enough_noise:g} none would stop"
            )
        return lines


def planned_privacy(settings: Settings) -> PlannedPrivacy | PlannedClients | None:
    """Return what a recipe costs its clients; None where nothing is hidden. The rows are read, no weights."""
    privacy, prepared = settings.privacy, Preparation(settings, Path("runs") / "described", SketchWorkshop())
    if privacy.unit == "none":
        return None
    if privacy.unit == "client":
        return planned_clients(prepared)
    try:
        clients = tuple(_costs(prepared))
        most = max(clients, key=lambda one: one.epsilon)
        enough = None
        if privacy.max_epsilon is not None and most.epsilon > privacy.max_epsilon:
            rate = sampling_rate(most.num_units, settings.training.batch_size)
            enough = noise_multiplier_for(rate, most.steps, privacy.delta, privacy.max_epsilon)
    except FedloomError as error:
        return PlannedPrivacy(privacy.delta, privacy.max_epsilon, unknown=str(error))
    column = settings.data.unit_column
    return PlannedPrivacy(privacy.delta, privacy.max_epsilon, clients, enough, unit_column=column)


def _costs(prepared: Preparation) -> list[ClientCost]:
    plan, population, settings = prepared.plan, prepared.population, prepared.placed
    assert isinstance(plan, RoundPlan)
    training = training_of(settings)
    drawn = Counter(client for round in range(1, plan.num_rounds + 1) for client in plan.sample(round))
    found = []
    for client, name in enumerate(population.names):
        rows = population.rows_of(client)
        units = num_units_of(rows)
        one = booking_of(training, units, client, 1)
        steps = one.steps * drawn[client]
        cost = epsilon_at_most(PrivateStep(one.rate, one.noise_multiplier), steps, settings.privacy.delta)
        found.append(ClientCost(name, units, drawn[client], steps, math.ceil(cost * 1e6) / 1e6, len(rows)))
    return found
