"""What hiding whole clients will cost over a recipe's rounds, how large its noise is, and what meets the budget."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedloom.assembly.preparation import Preparation
from fedloom.assembly.private_rounds import client_step, is_amplified, most_steps
from fedloom.assembly.round_plan import client_privacy_of
from fedloom.errors import FedloomError
from fedloom.federation.rounds import RoundPlan
from fedloom.lora.pair import rank_in
from fedloom.privacy.accountant import epsilon_at_most, noise_multiplier_for
from fedloom.wording import counted


@dataclass(frozen=True)
class PlannedClients:
    """What a run costs each of its clients, as far as it is known; ``unknown`` says why it is not.

    Attributes:
        epsilon: of the client that is asked most often, after all rounds.
        num_rounds: rounds of the plan.
        allowed_rounds: those that the budget is enough for.
        rate: the chance by which each client is drawn; 1 where the draw is no secret.
        expected_clients: what the noised sum is divided by.
        noise_to_clip: norm of the noise on the mean, relative to the largest norm that a mean of clipped changes has.
        noise_excess: variance of the clients' shares of noise where all stay, relative to what ε counts.
        enough_noise: the multiplier with which all rounds stay within the budget, where they do not.
    """

    delta: float
    max_epsilon: float | None
    epsilon: float = 0.0
    num_rounds: int = 0
    allowed_rounds: int = 0
    rate: float = 1.0
    expected_clients: float = 0.0
    noise_to_clip: float = 0.0
    enough_noise: float | None = None
    noise_excess: float = 1.0
    unknown: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"unit": "client", **asdict(self)}

    def lines(self) -> list[str]:
        """Return it for people."""
        if self.unknown is not None:
            return [f"privacy: what the run costs is not known: {self.unknown}"]
        drawn = f"each drawn by itself with a chance of {self.rate:g}, which is counted"
        if self.rate == 1.0:
            drawn = "counted without amplification by sampling"
        lines = [
            f"privacy: every client is hidden; ε = {self.epsilon:.3f} at δ = {self.delta:g} after "
            f"{counted(self.num_rounds, 'round')} of {self.expected_clients:g} clients ({drawn})",
            f"noise: {self.noise_to_clip:.2f} times as large as a mean change of the clip's norm; it falls as clients "
            "a round grow",
        ]
        if self.noise_excess > 1.0:
            more = 100.0 * (math.sqrt(self.noise_excess) - 1.0)
            lines.append(
                f"noise: added by the clients in shares; where all stay it is {more:.0f} % larger than ε needs"
            )
        if self.enough_noise is not None:
            ends = "is not enough for a round"
            if self.allowed_rounds:
                ends = f"ends the run after {counted(self.allowed_rounds, 'round')}"
            lines.append(
                f"privacy.max_epsilon = {self.max_epsilon:g} {ends}; "
                f"privacy.noise_multiplier = {self.enough_noise:g} is enough for {self.num_rounds}"
            )
        return lines


def planned_clients(prepared: Preparation) -> PlannedClients:
    """Return what hiding whole clients costs; the rows are read, no weights."""
    privacy = prepared.settings.privacy
    try:
        plan, settings = prepared.plan, prepared.placed
        assert isinstance(plan, RoundPlan)
        hidden = client_privacy_of(settings)
        assert hidden is not None
        step, paid = client_step(settings), most_steps(settings, plan)
        whole, limit = epsilon_at_most(step, paid[-1], privacy.delta), privacy.max_epsilon
        enough, allowed = None, plan.num_rounds
        if limit is not None and whole > limit:
            enough = noise_multiplier_for(step.rate, paid[-1], privacy.delta, limit)
            affordable = {count: epsilon_at_most(step, count, privacy.delta) <= limit for count in set(paid)}
            allowed = sum(affordable[count] for count in paid)
        excess = 1.0 if hidden.shares is None else settings.cohort_size / hidden.shares
        ranks = max(prepared.population.ranks.values())
        size = sum(num_out * rank_in((num_out, num_in), ranks) for num_out, num_in in plan.shapes.values())
    except FedloomError as error:
        return PlannedClients(privacy.delta, privacy.max_epsilon, unknown=str(error))
    return PlannedClients(
        privacy.delta,
        limit,
        epsilon=math.ceil(whole * 1e6) / 1e6,
        num_rounds=plan.num_rounds,
        allowed_rounds=allowed,
        rate=step.rate if is_amplified(settings) else 1.0,
        expected_clients=hidden.expected_clients,
        noise_to_clip=hidden.noise_multiplier * math.sqrt(size * excess) / hidden.expected_clients,
        noise_excess=excess,
        enough_noise=enough,
    )
