"""Settings become what a client may spend of its privacy, and what a round of it costs."""

from __future__ import annotations

from typing import Final, Literal

from fedloom.config import Settings
from fedloom.data.tokens import TokenSet
from fedloom.privacy.ledger import Booking, Budget
from fedloom.training.cohort_round import LocalTraining
from fedloom.training.private_rows import private_steps_of, sampling_rate

SEED: Final = "seed"
SYSTEM: Final = "system"
"""Where draws come from: from the run's seed it is a simulation, from each site's operating system it is not."""


def budget_of(settings: Settings) -> Budget:
    """Return what a client may spend."""
    return Budget(settings.privacy.delta, settings.privacy.max_epsilon)


def booking_of(
    training: LocalTraining,
    num_units: int,
    client: int,
    round: int,
    *,
    run: str = "",
    draws: Literal["seed", "system"] = SEED,
) -> Booking:
    """Return what a client of so many units spends in a round of private training.

    A run in one process or on a cluster keeps a ledger of its own, so it needs no name in it.
    """
    assert training.privacy is not None
    return Booking(
        run=run,
        client=client,
        round=round,
        steps=private_steps_of(num_units, training.batch_size, training.steps, training.epochs),
        rate=sampling_rate(num_units, training.batch_size),
        noise_multiplier=training.privacy.noise_multiplier,
        draws=draws,
    )


def num_units_of(rows: TokenSet) -> int:
    """Return how many units a client's rows are of."""
    return len(rows.by_unit())
