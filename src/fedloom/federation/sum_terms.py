"""What all who take part in a masked round agree on before it, and what each of them adds to the sum.

A client's share of the sum is ``q_k = min(largest, unit · w_k)`` of its own weight, with two numbers that are the same
for all. So a server that lies about them changes all shares alike, and cannot let one client's numbers stand alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.errors import UpdateError
from fedloom.federation.weights import capped
from fedloom.lora.pair import Adapter
from fedloom.methods.masked_sums import MaskedSums, Numbers
from fedloom.methods.strategy import normalised
from fedloom.privacy.secure_sum.wire import Session, context_of

FEWEST_MEMBERS = 3
"""One of two clients knows the other's numbers."""
SMALLEST_SHARE = 2.0**-20
"""Below it too few digits are left in fixed point: a client whose numbers are larger would stand alone."""


def threshold_of(threshold: int | None, num_clients: int) -> int:
    """Return how many of so many clients must stay: by default the fewest that are more than two thirds of them."""
    return threshold if threshold is not None else 2 * num_clients // 3 + 1


@dataclass(frozen=True)
class SumTerms:
    """A round's sum, as all its members know it: a member that is told other terms is in no sum with the others.

    Attributes:
        run, round, token: name the sum; the token is drawn anew for every attempt at a round.
        members: the clients of the round, ascending.
        threshold: how many of them must stay to the end.
        unit_share, largest_share: what gives a client's share.
    """

    run: str
    round: int
    token: str
    members: tuple[int, ...]
    threshold: int
    unit_share: float
    largest_share: float

    def session(self, strategy: MaskedSums) -> Session:
        """Return the session of a method's numbers, which binds what each client is told of the noise too.

        Raises:
            ValueError: the members are too few or not ascending, or the threshold does not fit them.
        """
        bound = (self.run, self.round, self.token, *self.members, self.threshold, self.unit_share, self.largest_share)
        length, agreed = strategy.num_numbers, strategy.rule.agreed
        return Session(context_of("masked round", *bound, length, *agreed), self.members, self.threshold, length)

    def share(self, weight: float) -> float:
        """Return the share of a client of this weight.

        Raises:
            UpdateError: it is none, or so small that its numbers would be lost.
        """
        found = min(self.largest_share, self.unit_share * weight)
        if not SMALLEST_SHARE <= found <= 1.0:
            raise UpdateError(
                f"expected a share of the sum from {SMALLEST_SHARE:.1e} to 1, got {found:g}; check the clients' weights"
            )
        return found


def shares_told(weights: Mapping[int, float], max_weight: float) -> tuple[float, float]:
    """Return ``unit`` and ``largest`` for clients of these weights, of whom none may have more than ``max_weight``."""
    shares = normalised(capped(weights, max_weight))
    return max(shares[client] / weight for client, weight in weights.items()), max(shares.values())


def check_hides(terms: SumTerms, client: int, known: Sequence[int], fewest: int) -> None:
    """Check at a client that a sum hides its numbers among those of at least ``fewest`` of the clients it knows.

    Raises:
        UpdateError: it does not.
    """
    n, least = len(terms.members), max(fewest, FEWEST_MEMBERS)
    if client not in terms.members or not set(terms.members) <= set(known):
        raise UpdateError(f"expected a sum of the study's clients with client {client}, got others; take no part")
    if terms.threshold < least or 3 * terms.threshold <= 2 * n or terms.threshold > n:
        raise UpdateError(
            f"expected a sum to which at least {least} clients and more than two thirds of its {n} stay, got a "
            f"threshold of {terms.threshold}; take no part"
        )


def numbers_added(
    strategy: MaskedSums, round: int, start: Adapter, trained: Adapter, share: float, noise: Numbers
) -> NDArray[np.float64]:
    """Return what a client adds to a round's sum, its noise too: it began with ``start``, ended with ``trained``."""
    found = strategy.rule.summand(round, start, trained, share)
    whole = [found[key] + noise[key] if noise else found[key] for key in strategy.sizes()]
    numbers: NDArray[Any] = torch.cat([one.flatten() for one in whole]).numpy()
    return numbers
