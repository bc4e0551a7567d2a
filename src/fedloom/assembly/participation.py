"""Who took part in a run that is there already, to be replayed in another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedloom.errors import RunError
from fedloom.run_folder.reader import read_run


def participation_of(path: Path, num_clients: int) -> Callable[[int], list[int]]:
    """Return the clients of a round by its number: those whose updates counted in the run in ``path``.

    Raises:
        RunError: there is no run, or it has other clients; when called, a round that the run has not completed.
    """
    records = {record["round"]: record["clients"] for record in read_run(path).records}
    counted = {n: sorted(c["client"] for c in clients if c["reason"] is None) for n, clients in records.items()}
    largest = max((client for clients in counted.values() for client in clients), default=-1)
    if largest >= num_clients:
        raise RunError(
            f"{path}: expected a run of {num_clients} clients (federation.participation), its client {largest} took "
            "part; use the settings and rows of that run"
        )

    def clients_of(round: int) -> list[int]:
        if round not in counted:
            raise RunError(
                f"{path}: expected round {round} to replay (federation.participation), it has {len(counted)} rounds; "
                "lower federation.num_rounds, or finish that run"
            )
        return counted[round]

    return clients_of
