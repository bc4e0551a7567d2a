"""Settings become what a client may spend of its privacy, and what a round of it costs."""

from __future__ import annotations

from typing import Final

from fedloom.assembly.round_plan import training_of
from fedloom.config import Settings
from fedloom.data.tokens import TokenSet
from fedloom.privacy.ledger import Booking, Budget
from fedloom.training.private_rows import private_steps_of, sampling_rate

SEED: Final = "seed"
SYSTEM: Final = "system"
"""Where draws come from: from the run's seed it is a simulation, from each site's operating system it is not."""


def budget_of(settings: Settings) -> Budget:
    """Return what a client may spend."""
    return Budget(settings.privacy.delta, settings.privacy.max_epsilon)


def booking_of(settings: Settings, num_units: int, client: int, round: int) -> Booking:
    """Return what a client of so many units spends in a round of a run in one process or on a cluster."""
    training, privacy = training_of(settings), settings.privacy
    return Booking(
        run="",
        client=client,
        round=round,
        steps=private_steps_of(num_units, training.batch_size, training.steps, training.epochs),
        rate=sampling_rate(num_units, training.batch_size),
        noise_multiplier=privacy.noise_multiplier,
        draws=SEED,
    )


def num_units_of(rows: TokenSet) -> int:
    """Return how many units a client's rows are of."""
    return len(rows.by_unit())
