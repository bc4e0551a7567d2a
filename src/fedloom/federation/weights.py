"""The largest share of one client: weights cut down to it, and what is cut given to the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def capped(weights: Mapping[int, float], largest: float, trusted: Collection[int] = ()) -> dict[int, float]:
    """Return weights of which no client has a share above ``largest``; as they are where none has.

    What is cut goes to the others in proportion to their weights, again and again until nobody is above. Where there
    are too few clients for that (fewer than ``1 / largest``) all weigh the same. ``trusted`` ones are never cut: the
    server where it stands in for several clients.

        p_k = min(largest, c · w_k),   c such that Σ p_k = 1
    """
    total = sum(weights.values())
    if all(weight <= largest * total for client, weight in weights.items() if client not in trusted):
        return dict(weights)
    at_most: set[int] = set()
    while True:
        free = {client: weight for client, weight in weights.items() if client not in at_most}
        left, rest = 1.0 - largest * len(at_most), sum(free.values())
        if left <= 0.0 or rest <= 0.0:
            return dict.fromkeys(weights, 1.0 / len(weights))
        above = {c for c, weight in free.items() if c not in trusted and weight * left > largest * rest}
        if not above:
            return {c: largest if c in at_most else weights[c] * left / rest for c in weights}
        at_most |= above
