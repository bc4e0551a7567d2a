"""Choose a partition scheme by name, as a recipe does."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, assert_never

import numpy as np

from fedloom.data.partition import Partition
from fedloom.data.schemes import by_category, by_length, by_power_law, by_size, dirichlet, iid, natural, shards
from fedloom.data.sources import Rows
from fedloom.data.tokens import TokenSet
from fedloom.errors import PartitionError


class Scheme(StrEnum):
    """How rows are split among clients; each is a function of ``fedloom.data.schemes``."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    SHARDS = "shards"
    CATEGORY = "category"
    SIZE = "size"
    POWER_LAW = "power-law"
    LENGTH = "length"
    NATURAL = "natural"


@dataclass(frozen=True)
class Division:
    """A scheme and its numbers; each scheme reads those it names.

    ``column`` is the category of ``dirichlet``, ``shards`` and ``category``, and the owner of ``natural``; natural
    without a column makes one client of each file. ``num_clients`` None is for natural only: as many as the data name.
    """

    scheme: Scheme
    num_clients: int | None = None
    column: str | None = None
    concentration: float = 0.5
    min_rows: int = 1
    shards_per_client: int = 2
    categories_per_client: int = 2
    exponent: float = 1.0


def divide(division: Division, rows: Rows, tokens: TokenSet, *, seed: int) -> Partition:
    """Split ``rows`` (those that were kept, in the order of ``tokens``) as ``division`` says.

    Raises:
        PartitionError: the rows cannot be split that way, a client gets fewer than ``min_rows``, or the scheme needs a
            column or a number of clients.
    """
    _check_encoded(rows, tokens)
    # A dialogue's rows have one owner, and so have a person's where they are dealt; natural owners are as they are.
    units = rows.originals if division.scheme is Scheme.NATURAL else rows.units
    _, first = np.unique(units, return_index=True)
    if len(first) < len(rows):
        of_units = divide(division, rows.select(first), tokens.select(first), seed=seed)
        return Partition.from_owners(of_units.owner_of_row()[units], of_units.names, of_units.how)
    partition = _divided(division, rows, tokens, seed)
    sizes = np.diff(partition.starts)
    short = np.flatnonzero(sizes < division.min_rows)
    if short.size:
        fewer = "" if division.scheme is Scheme.NATURAL else " lower federation.num_clients,"
        raise PartitionError(
            f"partition.min_rows: expected {division.min_rows} rows for every client, partition.scheme "
            f"{division.scheme} leaves {short.size} of {len(sizes)} with fewer (client {partition.names[short[0]]}: "
            f"{sizes[short[0]]}); lower it,{fewer} or use more rows"
        )
    return partition


def _divided(division: Division, rows: Rows, tokens: TokenSet, seed: int) -> Partition:
    match division.scheme:
        case Scheme.NATURAL:
            owners = rows.client_of_file() if division.column is None else _categories(division, rows)
            return natural(owners, division.num_clients)
        case Scheme.IID:
            return iid(len(rows), _num_clients(division), seed=seed)
        case Scheme.LENGTH:
            return by_length(tokens.lengths, _num_clients(division))
        case Scheme.SIZE | Scheme.POWER_LAW:
            return _divide_by_size(division, len(rows), seed)
        case Scheme.DIRICHLET | Scheme.SHARDS | Scheme.CATEGORY:
            return _divide_by_category(division, _categories(division, rows), seed)
        case _:
            assert_never(division.scheme)


def _check_encoded(rows: Rows, tokens: TokenSet) -> None:
    if len(rows) != len(tokens):
        raise PartitionError(
            f"expected the rows that were encoded, got {len(rows)} rows and {len(tokens)} encoded ones"
        )


def _divide_by_size(division: Division, num_rows: int, seed: int) -> Partition:
    num_clients, min_rows = _num_clients(division), division.min_rows
    if division.scheme is Scheme.POWER_LAW:
        return by_power_law(num_rows, num_clients, exponent=division.exponent, min_rows=min_rows, seed=seed)
    return by_size(num_rows, num_clients, concentration=division.concentration, min_rows=min_rows, seed=seed)


def _divide_by_category(division: Division, categories: list[Any], seed: int) -> Partition:
    num_clients = _num_clients(division)
    if division.scheme is Scheme.SHARDS:
        return shards(categories, num_clients, shards_per_client=division.shards_per_client, seed=seed)
    if division.scheme is Scheme.CATEGORY:
        return by_category(categories, num_clients, categories_per_client=division.categories_per_client, seed=seed)
    concentration, min_rows = division.concentration, division.min_rows
    return dirichlet(categories, num_clients, concentration=concentration, min_rows=min_rows, seed=seed)


def _num_clients(division: Division) -> int:
    if division.num_clients is None:
        raise PartitionError(
            f"federation.num_clients: expected a number with partition.scheme = {division.scheme}, got none; set it"
        )
    return division.num_clients


def _categories(division: Division, rows: Rows) -> list[Any]:
    if division.column is None:
        columns = ", ".join(map(repr, rows.rows[0])) if len(rows) else "none"
        raise PartitionError(
            f"partition.column: expected a column with partition.scheme = {division.scheme}, got none; "
            f"set it to one of {columns}"
        )
    return rows.column(division.column)
