"""Settings become what a client may spend of its privacy, and what a round of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedloom.assembly.round_plan import SEED, Drawn
from fedloom.config import Settings
from fedloom.data.tokens import TokenSet
from fedloom.errors import PrivacyError
from fedloom.federation.rounds import RoundPlan
from fedloom.privacy.accountant import PrivateStep, epsilon, noise_multiplier_for
from fedloom.privacy.ledger import EVERYBODY, Booking, Budget
from fedloom.training.cohort_round import LocalTraining
from fedloom.training.private_rows import private_steps_of, sampling_rate


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
    draws: Drawn = SEED,
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


def is_amplified(settings: Settings) -> bool:
    """Tell whether clients are drawn each by itself and in secret: a draw that may leave one out hides it more."""
    return settings.federation.sampling == "poisson"


def client_step(settings: Settings) -> PrivateStep:
    """Return what a round costs a client that is hidden as a whole, and may be drawn or is."""
    rate = settings.sampling_rate if is_amplified(settings) else 1.0
    return PrivateStep(rate, settings.privacy.noise_multiplier)


def client_bookings(settings: Settings, cohort: Sequence[int], round: int, draws: Drawn) -> list[Booking]:
    """Return what a round costs: everybody where anybody may have been drawn, else those who were."""
    step, clients = client_step(settings), [EVERYBODY] if is_amplified(settings) else cohort
    return [Booking("", client, round, 1, step.rate, step.noise_multiplier, draws) for client in clients]


def most_steps(settings: Settings, plan: RoundPlan) -> list[int]:
    """Return after each round how many steps the client has paid for that has paid most."""
    if is_amplified(settings):
        return list(range(1, plan.num_rounds + 1))
    paid, most = Counter[int](), list[int]()
    for round in range(1, plan.num_rounds + 1):
        paid.update(plan.sample(round))
        most.append(max(paid.values(), default=0))
    return most


def rounds_within_budget(settings: Settings, plan: RoundPlan) -> int:
    """Return how many rounds hidden clients may be part of; all where there is no limit.

    Raises:
        PrivacyError: not even the first.
        MissingExtraError: the accountant is not installed.
    """
    limit, delta, step = settings.privacy.max_epsilon, settings.privacy.delta, client_step(settings)
    if limit is None:
        return plan.num_rounds
    paid, low, high = most_steps(settings, plan), 0, plan.num_rounds
    while low < high:  # ε only grows
        middle = (low + high + 1) // 2
        low, high = (middle, high) if epsilon({step: paid[middle - 1]}, delta) <= limit else (low, middle - 1)
    if low == 0:
        enough = noise_multiplier_for(step.rate, paid[-1], delta, limit)
        raise PrivacyError(
            f"expected at most privacy.max_epsilon = {limit:g} at delta = {delta:g}, got "
            f"{epsilon({step: paid[0]}, delta):.4g} with the first round; set privacy.noise_multiplier = {enough:g} "
            f"for {plan.num_rounds} rounds, or raise max_epsilon"
        )
    return low
