"""A run as it was after any round whose state is kept."""

from __future__ import annotations

from dataclasses import replace

from fedloom.assembly.round_state import standing_in
from fedloom.assembly.start_adapter import ground_of
from fedloom.config.input_tables import Model
from fedloom.errors import RunError
from fedloom.lora.algebra import compress, united
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Standing
from fedloom.methods.state_codec import damage_named
from fedloom.run_folder.best_round import best_round
from fedloom.run_folder.contents import STATE
from fedloom.run_folder.reader import StoredRun

BEST = "best"
RESULT = "result"
"""Name of the shared adapter; if each client has its own, they are ``client-0``, ``client-1``, ..."""


def run_until(run: StoredRun, asked: int | str) -> StoredRun:
    """Return the run as it was when a round had ended: its records up to there, and that round's figures as its end.

    ``asked`` is the round's number, or ``best``: that of the lowest loss on the rows that the run measures itself on.

    Raises:
        RunError: it has no such round, or its state is not kept.
    """
    n = _number(run, asked)
    if not (run.path / "rounds" / str(n) / STATE).is_dir():
        kept = [m for m in range(1, len(run.records) + 1) if (run.path / "rounds" / str(m) / STATE).is_dir()]
        raise RunError(
            f"--round {asked}: expected a round whose state {run.path} keeps ({', '.join(map(str, kept)) or 'none'}), "
            f'got {n}; choose one of these, or train with run.keep_states = "all" or "best"'
        )
    end = None if run.finished is None else {**run.finished, "round": n, "eval": run.records[n - 1].get("eval")}
    return replace(run, records=run.records[:n], finished=end)


def adapters_after(run: StoredRun, model: Model) -> dict[str, Adapter]:
    """Return the adapters after the last of a run's records, as its end would write them; none of the bare base.

    Raises:
        RunError: the state is missing or damaged.
        AdapterError: the adapter that it started from (``model.adapter``) is not there.
    """
    ground = ground_of(model, run.manifest["identity"].get("adapter_sha256"))
    files = run.round_files(len(run.records))
    with damage_named(files.folder):
        standing: Standing = standing_in(files)
    own = {client: united([ground, adapter]) for client, adapter in sorted(standing.own.items())}
    if len(own) > 1:
        return {f"client-{client}": adapter for client, adapter in own.items()}
    if own:
        return {RESULT: next(iter(own.values()))}
    shared = compress(united([ground, standing.shared])).adapter
    return {RESULT: shared} if any(shared.ranks.values()) else {}


def _number(run: StoredRun, asked: int | str) -> int:
    known = len(run.records)
    if asked == BEST:
        best = best_round(run.records)
        if best is None:
            raise RunError(
                f"--round best: expected rounds with a loss on held-out rows in {run.path}, got none; hold rows out "
                "and set evaluation.every, or choose a number"
            )
        return best
    try:
        n = int(asked)
    except ValueError:
        n = 0
    if not 1 <= n <= known:
        raise RunError(
            f"--round: expected best, or 1 to {known}, the rounds that {run.path} has completed, got {asked!r}; "
            "choose one of these"
        )
    return n
