"""Who took part in a run that is there already, to be replayed in another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.run_folder.reader import read_run
from fedloom.split.departures import Departure, Departures


def participation_of(path: Path, num_clients: int) -> Callable[[int], list[int]]:
    """Return the clients of a round by its number: those whose updates counted in the run in ``path``.

    Raises:
        RunError: there is no run, or it has other clients; when called, a round that the run has not completed.
    """
    records = _clients_by_round(path)
    counted = {n: sorted(c["client"] for c in clients if c["reason"] is None) for n, clients in records.items()}
    largest = max((client for clients in counted.values() for client in clients), default=-1)
    if largest >= num_clients:
        raise RunError(
            f"{path}: expected a run of {num_clients} clients (federation.participation), its client {largest} took "
            "part; use the settings and rows of that run"
        )

    def clients_of(round: int) -> list[int]:
        _check_done(path, round, len(counted))
        return counted[round]

    return clients_of


def departures_of(path: Path) -> Departures:
    """Return which clients left a period of the split run in ``path``, and when, by the period's number.

    Raises:
        RunError: there is no split run; when called, a period that the run has not completed, or in which a client's
            activations were not what an honest one sends.
    """
    records = _clients_by_round(path)
    if any("left_at" not in client for clients in records.values() for client in clients):
        raise RunError(
            f"{path}: expected a run of a cut model to replay (federation.participation), got another; name one of "
            "the same method"
        )

    def leaving(round: int) -> dict[int, Departure]:
        _check_done(path, round, len(records))
        left = {c["client"]: Departure(**c["left_at"]) for c in records[round] if c["left_at"] is not None}
        if spoilt := [client for client, moment in left.items() if moment.stage == "loss"]:
            raise RunError(
                f"{path}: expected period {round} to replay (federation.participation), client {spoilt[0]} spoilt a "
                "step of it with activations that gave no finite loss; name another run"
            )
        return left

    return leaving


def _clients_by_round(path: Path) -> dict[int, list[dict[str, Any]]]:
    return {record["round"]: record["clients"] for record in read_run(path).records}


def _check_done(path: Path, round: int, num_rounds: int) -> None:
    if not 1 <= round <= num_rounds:
        raise RunError(
            f"{path}: expected round {round} to replay (federation.participation), it has {num_rounds} rounds; "
            "lower federation.num_rounds, or finish that run"
        )
