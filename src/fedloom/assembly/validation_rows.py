"""Rows that settings are chosen on: of the training rows, and never of those that a run is scored on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedloom.config import Settings
from fedloom.data.holdout import HoldOut, hold_out_of_owners, with_units
from fedloom.data.partition import Partition
from fedloom.data.sources import Rows
from fedloom.data.tokens import TokenSet
from fedloom.errors import DataError


def unvalidated(settings: Settings, seed: int) -> Settings:
    """Return the experiment under a seed without validation rows and canaries, and without a file of held-out rows."""
    data = {"validation_fraction": None, "scored_seeds": (), "eval_path": None, "canaries": 0}
    return settings.model_copy(
        update={
            "data": settings.data.model_copy(update=data),
            "run": settings.run.model_copy(update={"seed": seed}),
        }
    )


def set_aside(
    rows: Rows,
    tokens: TokenSet,
    partition: Partition,
    scored: Sequence[TokenSet | None],
    fraction: float,
    rng: np.random.Generator,
) -> tuple[HoldOut, Partition]:
    """Choose the validation rows among training rows, and return who owns the rows that stay.

    Rows of the same tokens as one of ``scored`` are neither kept nor held: nothing is learned or chosen on a row that
    a run is scored on. Of the others ``fraction`` is held, of which every client keeps at least one. The answers of a
    dialogue stay together. Positions are those in ``rows``, which are in step with ``tokens`` and ``partition``.

    Raises:
        DataError: a client would have no row to train on.
    """
    usable = np.flatnonzero(~_is_scored(rows, tokens, scored))
    owner_of_row = partition.owner_of_row()
    lost = np.setdiff1d(np.arange(partition.num_clients), owner_of_row[usable])
    if lost.size:
        raise DataError(
            f"data.scored_seeds: expected a row for every client beside those that runs are scored on, got none of "
            f"client {partition.names[lost[0]]}; hold rows out by data.eval_path, use more rows, or name fewer seeds"
        )
    units = rows.select(usable).units
    _, first = np.unique(units, return_index=True)
    split = with_units(hold_out_of_owners(owner_of_row[usable[first]], fraction, rng), units)
    kept, held = usable[split.kept], usable[split.held]
    return HoldOut(kept, held), Partition.from_owners(owner_of_row[kept], partition.names, partition.how)


def _is_scored(rows: Rows, tokens: TokenSet, scored: Sequence[TokenSet | None]) -> NDArray[np.bool_]:
    """Tell of every row whether a run is scored on its tokens, or on those of another answer of its dialogue."""
    contents = {_content(one, index) for one in scored if one is not None for index in range(len(one))}
    alone = np.array([_content(tokens, index) in contents for index in range(len(tokens))], np.bool_)
    units = rows.units
    return np.isin(units, units[alone]) if contents else alone


def _content(tokens: TokenSet, index: int) -> bytes:
    ids, supervised = tokens.row(index)
    return ids.tobytes() + supervised.tobytes()
