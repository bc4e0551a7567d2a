"""Canaries: sequences of random tokens planted among a client's rows, to see later whether a model gives them away.

Nobody can guess one, so a model under which one is likelier than others of its kind has learned it from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data.partition import Partition
from fedloom.data.tokens import TokenSet
from fedloom.errors import DataError
from fedloom.seeding import stream

CANARIES = "canaries.json"
"""The file of a run's folder that lists them."""
NUM_TOKENS = 8
"""Random tokens of a canary; what stands before them is the tokenizer's beginning of a text, where it has one."""


@dataclass(frozen=True)
class Canary:
    """A planted sequence: who holds it, how often, and its tokens, of which all but the first are learned."""

    client: str
    repetitions: int
    ids: tuple[int, ...]

    @property
    def row(self) -> TokenSet:
        """The canary as a row."""
        return rows_of_sequences(np.asarray([self.ids], np.int32))


@dataclass(frozen=True)
class Planting:
    """How many canaries each of some clients gets (none named: each client), and how often each is in its rows."""

    number: int = 0
    clients: tuple[str, ...] = ()
    repetitions: int = 1


def plant(
    tokens: TokenSet, partition: Partition, planting: Planting, tokenizer: Any, seed: int
) -> tuple[TokenSet, Partition, tuple[Canary, ...]]:
    """Return rows with the canaries behind them, who owns which, and the canaries.

    Raises:
        DataError: a client that is named is none.
    """
    if not planting.number:
        return tokens, partition, ()
    names = planting.clients or partition.names
    if unknown := [name for name in names if name not in partition.names]:
        known = ", ".join(partition.names[:12]) + (", ..." if len(partition.names) > 12 else "")
        raise DataError(
            f"data.canary_clients: expected clients of this run ({known}), got {unknown[0]!r}; correct its name"
        )
    canaries = tuple(
        Canary(name, planting.repetitions, tuple(sequences(tokenizer, 1, seed, name, index)[0].tolist()))
        for name in names
        for index in range(planting.number)
    )
    copies = [canary for canary in canaries for _ in range(canary.repetitions)]
    owners = [partition.names.index(canary.client) for canary in copies]
    owner = np.concatenate([partition.owner_of_row(), np.asarray(owners, np.int64)])
    return _with_rows(tokens, copies), Partition.from_owners(owner, partition.names, partition.how), canaries


def sequences(tokenizer: Any, count: int, seed: int, *name: str | int) -> NDArray[np.int32]:
    """Return sequences (count, T) that could be canaries: ordinary tokens, each as likely, behind the beginning."""
    ordinary, begin = _ordinary(tokenizer), tokenizer.bos_token_id
    drawn = ordinary[stream(seed, "canaries", *name).integers(0, len(ordinary), (count, NUM_TOKENS))]
    if begin is None:
        return drawn.astype(np.int32)
    return np.concatenate([np.full((count, 1), begin), drawn], axis=1).astype(np.int32)


def rows_of_sequences(ids_NT: NDArray[np.int32]) -> TokenSet:
    """Return sequences as rows of which all tokens but the first are learned."""
    learned = np.arange(ids_NT.shape[1]) > 0
    return TokenSet.from_rows((ids, learned) for ids in ids_NT)


def _ordinary(tokenizer: Any) -> NDArray[np.int64]:
    """Return the ids that are no special token and that the base has a row for."""
    known = min(len(tokenizer), getattr(tokenizer, "num_base_ids", None) or len(tokenizer))
    return np.setdiff1d(np.arange(known), np.asarray(tokenizer.all_special_ids, np.int64))


def _with_rows(tokens: TokenSet, copies: Sequence[Canary]) -> TokenSet:
    """Return rows with others behind them, each a unit of its own."""
    joined = TokenSet.concatenate([tokens, *(copy.row for copy in copies)])
    units = np.arange(len(tokens)) if tokens.units is None else tokens.units
    first = int(units.max(initial=-1)) + 1
    return TokenSet(
        joined.input_ids,
        joined.supervised,
        joined.starts,
        np.concatenate([units, np.arange(first, first + len(copies))]),
    )
