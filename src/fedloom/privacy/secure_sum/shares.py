"""Shares of a secret of 32 bytes: any t of n give it back, fewer say nothing of it.

The secret is the value at 0 of a random polynomial of degree t − 1 over the whole numbers modulo the prime 2⁵²¹ − 1;
member number i, from 1, gets the value at i.

Source: Shamir, How to Share a Secret (1979).
"""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.errors import UpdateError
from fedloom.privacy.secure_sum.keys import Entropy

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66


def shares_of(secret: bytes, num_members: int, threshold: int, entropy: Entropy) -> list[bytes]:
    """Return the shares of the members 1 to n."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= num_members:
        raise ValueError(f"expected 32 bytes and a threshold of 1 to {num_members}, got {len(secret)} and {threshold}")
    numbers = [int.from_bytes(secret, "big"), *(_random(entropy) for _ in range(threshold - 1))]
    return [_value_at(place, numbers).to_bytes(SHARE_BYTES, "big") for place in range(1, num_members + 1)]


def secret_of(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret of shares by member number; those beyond the threshold must fit the others.

    Raises:
        UpdateError: there are too few, or they are not all of one secret.
    """
    if len(shares) < threshold:
        raise UpdateError(f"expected {threshold} shares of a secret, got {len(shares)}; start a new sum")
    values = {place: int.from_bytes(share, "big") for place, share in sorted(shares.items())}
    known = dict(list(values.items())[:threshold])
    secret = _interpolated(known, 0)
    fits = all(_interpolated(known, place) == value for place, value in values.items() if place not in known)
    if not fits or secret >= 1 << (8 * SECRET_BYTES) or any(value >= PRIME for value in values.values()):
        raise UpdateError("expected shares of one secret, got others: a member sent a wrong one; start a new sum")
    return secret.to_bytes(SECRET_BYTES, "big")


def _random(entropy: Entropy) -> int:
    """Return a number below the prime, each as likely as another."""
    while (number := int.from_bytes(entropy(SHARE_BYTES), "big") & PRIME) == PRIME:
        pass
    return number


def _value_at(place: int, numbers: list[int]) -> int:
    value = 0
    for number in reversed(numbers):
        value = (value * place + number) % PRIME
    return value


def _interpolated(values: Mapping[int, int], at: int) -> int:
    """Return the value at a place of the polynomial through the values (Lagrange)."""
    found = 0
    for place, value in values.items():
        above, below = 1, 1
        for other in values:
            if other != place:
                above = above * (at - other) % PRIME
                below = below * (place - other) % PRIME
        found = (found + value * above * pow(below, -1, PRIME)) % PRIME
    return found
