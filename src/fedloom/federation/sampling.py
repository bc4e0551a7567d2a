"""Who takes part in a round: a pure function of the run's seed and the round's number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedloom.seeding import stream


def sample_by_rows(seed: int, round: int, num_rows: Sequence[int], clients_per_round: int) -> list[int]:
    """Return ``clients_per_round`` client ids, ascending, each drawn with a chance in proportion to its rows.

    Systematic sampling: clients lie on a line in a random order, each as long as its share of the draws, and every
    unit of the line picks the one at a random offset. A client with more than a full share is always drawn, and the
    others share what is left in proportion to their rows, so no client comes twice. With equal weights the mean over
    those drawn is unbiased for the mean over all rows as long as no client has more than one draw's share of them.
    """
    shares = np.array(inclusion(num_rows, clients_per_round))
    rng = stream(seed, "clients", round)
    order = rng.permutation(len(shares))
    ends = np.cumsum(shares[order])
    places = rng.random() + np.arange(clients_per_round)
    drawn = order[np.minimum(np.searchsorted(ends, places * ends[-1] / clients_per_round, "right"), len(order) - 1)]
    return sorted({int(client) for client in drawn})


def sample_poisson(seed: int, round: int, num_clients: int, rate: float) -> list[int]:
    """Return the ids of those drawn, ascending: each with the probability ``rate``, whoever else is; perhaps nobody.

    It is what amplification by sampling is claimed from, while nobody who sees the result knows the draw.
    """
    return [int(client) for client in np.flatnonzero(stream(seed, "clients", round).random(num_clients) < rate)]


def inclusion(num_rows: Sequence[int], clients_per_round: int) -> list[float]:
    """Return each client's chance to be drawn: in proportion to its rows, and 1 at most."""
    rows = np.asarray(num_rows, dtype=float)
    certain = np.zeros(len(rows), dtype=bool)
    while True:
        left = clients_per_round - int(certain.sum())
        chances = np.where(certain, 1.0, left * rows / max(rows[~certain].sum(), 1.0))
        if not (above := (chances > 1.0) & ~certain).any():
            return [float(chance) for chance in chances]
        certain |= above


def sample_clients(seed: int, round: int, num_clients: int, clients_per_round: int) -> list[int]:
    """Return ``clients_per_round`` of the ids 0 … num_clients − 1, uniform without replacement, ascending.

    Costs as much as the clients drawn, whatever the population. Source: FedAvg (arXiv 1602.05629), Algorithm 1.
    """
    if clients_per_round == num_clients:
        return list(range(num_clients))
    drawn = stream(seed, "clients", round).choice(num_clients, size=clients_per_round, replace=False, shuffle=False)
    return [int(client) for client in np.sort(drawn)]
