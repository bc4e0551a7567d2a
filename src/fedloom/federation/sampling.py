"""Who takes part in a round: a pure function of the run's seed and the round's number."""

from __future__ import annotations

import numpy as np

from fedloom.seeding import stream


def sample_clients(seed: int, round: int, num_clients: int, clients_per_round: int) -> list[int]:
    """Return ``clients_per_round`` of the ids 0 … num_clients − 1, uniform without replacement, ascending.

    Costs as much as the clients drawn, whatever the population. Source: FedAvg (arXiv 1602.05629), Algorithm 1.
    """
    if clients_per_round == num_clients:
        return list(range(num_clients))
    drawn = stream(seed, "clients", round).choice(num_clients, size=clients_per_round, replace=False, shuffle=False)
    return [int(client) for client in np.sort(drawn)]
