"""Ways to split rows among clients. Each gives every row to exactly one client, and is a pure function of its seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from fedloom.data.groups import group, members
from fedloom.data.partition import Partition
from fedloom.errors import PartitionError
from fedloom.names import name_order
from fedloom.seeding import stream

IntArray = npt.NDArray[np.int64]
Categories = Sequence[Hashable]
How = dict[str, str | int | float]


def iid(num_rows: int, num_clients: int, *, seed: int) -> Partition:
    """Deal shuffled rows to clients; sizes differ by at most one."""
    _check_sizes(num_rows, num_clients, min_rows=1)
    owner = np.empty(num_rows, np.int64)
    owner[stream(seed, "partition", "iid").permutation(num_rows)] = np.arange(num_rows) % num_clients
    return Partition.from_owners(owner, num_clients, {"scheme": "iid", "seed": seed})


def dirichlet(
    categories: Categories,
    num_clients: int,
    *,
    concentration: float,
    min_rows: int = 1,
    max_draws: int = 20,
    seed: int,
) -> Partition:
    """Split each category's rows among clients by a draw p ~ Dirichlet(concentration · 1_K).

    Client k gets the rows between floor(n · (p_1 + … + p_{k-1})) and floor(n · (p_1 + … + p_k)) of the category's n
    shuffled rows. The whole draw is repeated until every client has ``min_rows`` rows, ``max_draws`` times at most;
    then the draw that lacked fewest rows is completed with rows taken at random from clients that have more.
    ``how["rows_moved"]`` says how many.

    Raises:
        PartitionError: there are fewer than ``min_rows`` rows per client, or the concentration is not positive.

    Source: Hsu et al. 2019, arXiv 1909.06335, over labels; FedIT with concentration 0.5 and 40 rows at least.
    Deviation: the completion, so that large populations can be split too.
    """
    _check_sizes(len(categories), num_clients, min_rows)
    _check_positive("concentration", concentration)
    names, group_of_row = group(categories)
    rows_of_category = members(group_of_row, len(names))
    best, fewest_lacking, draw = np.zeros(0, np.int64), len(categories) + 1, 0
    for draw in range(1, max_draws + 1):
        rng = stream(seed, "partition", "dirichlet", draw)
        owner = _dirichlet_draw(rows_of_category, num_clients, concentration, rng)
        lacking = _num_lacking(owner, num_clients, min_rows)
        if lacking < fewest_lacking:
            best, fewest_lacking = owner, lacking
        if lacking == 0:
            break
    owner = _complete(best, num_clients, min_rows, stream(seed, "partition", "dirichlet", "completion"))
    how: How = {"scheme": "dirichlet", "seed": seed, "concentration": concentration, "min_rows": min_rows}
    return Partition.from_owners(owner, num_clients, how | {"draws": draw, "rows_moved": fewest_lacking})


def shards(categories: Categories, num_clients: int, *, shards_per_client: int = 2, seed: int) -> Partition:
    """Sort rows by category, cut them into ``shards_per_client`` · K equal shards, give each client as many at random.

    Source: FedIT (Shepherd), with two shards per client.
    """
    _check_positive("shards_per_client", shards_per_client)
    num_shards = shards_per_client * num_clients
    _check_sizes(len(categories), num_clients, min_rows=shards_per_client)
    names, group_of_row = group(categories)
    rank_of_group = np.argsort(np.argsort(np.array(names)))
    order = np.argsort(rank_of_group[group_of_row], kind="stable")
    shard_of_position = np.arange(len(order)) * num_shards // len(order)
    client_of_shard = stream(seed, "partition", "shards").permutation(num_shards) % num_clients
    owner = np.empty(len(order), np.int64)
    owner[order] = client_of_shard[shard_of_position]
    how: How = {"scheme": "shards", "seed": seed, "shards_per_client": shards_per_client}
    return Partition.from_owners(owner, num_clients, how)


def by_category(categories: Categories, num_clients: int, *, categories_per_client: int, seed: int) -> Partition:
    """Give each client ``categories_per_client`` categories, and each category's rows in equal parts to its holders.

    Categories are dealt so that their numbers of holders differ by at most one.

    Raises:
        PartitionError: a client cannot hold that many, a category would have no holder, or a client no row.
    """
    _check_sizes(len(categories), num_clients, min_rows=1)
    names, group_of_row = group(categories)
    if not 1 <= categories_per_client <= len(names):
        raise PartitionError(
            f"partition.categories_per_client: expected 1 to {len(names)}, the number of categories, got "
            f"{categories_per_client}; change it"
        )
    if num_clients * categories_per_client < len(names):
        raise PartitionError(
            f"expected every category to have a client, got num_clients = {num_clients} with {categories_per_client} "
            f"of the {len(names)} categories each; raise partition.categories_per_client or federation.num_clients"
        )
    rng = stream(seed, "partition", "category")
    # Dealing around a shuffled circle gives a client distinct categories.
    circle = rng.permutation(len(names))
    places = np.arange(num_clients * categories_per_client)
    category_of_place, client_of_place = circle[places % len(names)], places // categories_per_client
    owner = np.empty(len(categories), np.int64)
    holders = members(category_of_place, len(names))
    for rows, places_here in zip(members(group_of_row, len(names)), holders, strict=True):
        owner[rng.permutation(rows)] = client_of_place[rng.permutation(places_here)][
            np.arange(len(rows)) % len(places_here)
        ]
    how: How = {"scheme": "category", "seed": seed, "categories_per_client": categories_per_client}
    return Partition.from_owners(owner, num_clients, how)


def by_size(num_rows: int, num_clients: int, *, concentration: float, min_rows: int = 1, seed: int) -> Partition:
    """Deal shuffled rows in unequal amounts: ``min_rows`` each, the rest by shares p ~ Dirichlet(concentration · 1_K).

    A small concentration gives few large clients and many small ones; a large one nearly equal sizes.
    """
    _check_sizes(num_rows, num_clients, min_rows)
    _check_positive("concentration", concentration)
    rng = stream(seed, "partition", "size")
    shares = rng.dirichlet(np.full(num_clients, concentration))
    how: How = {"scheme": "size", "seed": seed, "concentration": concentration, "min_rows": min_rows}
    return _deal(num_rows, shares, min_rows, rng, how)


def by_power_law(num_rows: int, num_clients: int, *, exponent: float, min_rows: int = 1, seed: int) -> Partition:
    """Deal shuffled rows in falling amounts: ``min_rows`` each, the rest in proportion to (k+1)^-exponent."""
    _check_sizes(num_rows, num_clients, min_rows)
    _check_positive("exponent", exponent)
    shares = np.arange(1, num_clients + 1, dtype=np.float64) ** -exponent
    how: How = {"scheme": "power-law", "seed": seed, "exponent": exponent, "min_rows": min_rows}
    return _deal(num_rows, shares / shares.sum(), min_rows, stream(seed, "partition", "power-law"), how)


def by_length(lengths: npt.ArrayLike, num_clients: int) -> Partition:
    """Sort rows by length and cut them into K equal parts: client 0 has the shortest, the last client the longest."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    _check_sizes(len(order), num_clients, min_rows=1)
    owner = np.empty(len(order), np.int64)
    owner[order] = np.arange(len(order)) * num_clients // len(order)
    return Partition.from_owners(owner, num_clients, {"scheme": "length"})


def natural(owners: Categories, num_clients: int | None = None) -> Partition:
    """Make one client of each distinct value (a column, or ``Rows.client_of_file()``), ordered by name.

    The order (:func:`~fedloom.names.name_order`) is of the names alone, so client k is the same one whatever the seed,
    the order of the rows, or how many of them are used.

    Raises:
        PartitionError: ``num_clients`` is given and the values are not that many.
    """
    found, number = group(owners)
    names = sorted(found, key=name_order)
    place = {name: index for index, name in enumerate(names)}
    owner = np.array([place[name] for name in found], np.int64)[number]
    if num_clients is not None and num_clients != len(names):
        raise PartitionError(
            f"federation.num_clients: expected {len(names)}, as many as the data name, got {num_clients}; "
            f"set it to {len(names)}"
        )
    return Partition.from_owners(owner, names, {"scheme": "natural"})


def _dirichlet_draw(
    rows_of_category: Sequence[IntArray], num_clients: int, concentration: float, rng: np.random.Generator
) -> IntArray:
    owner = np.empty(sum(map(len, rows_of_category)), np.int64)
    for rows in rows_of_category:
        shares = rng.dirichlet(np.full(num_clients, concentration))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(rows))
        owner[rng.permutation(rows)] = np.searchsorted(cuts, np.arange(len(rows)), side="right")
    return owner


def _num_lacking(owner: IntArray, num_clients: int, min_rows: int) -> int:
    return int(np.maximum(min_rows - np.bincount(owner, minlength=num_clients), 0).sum())


def _complete(owner: IntArray, num_clients: int, min_rows: int, rng: np.random.Generator) -> IntArray:
    sizes = np.bincount(owner, minlength=num_clients)
    receivers = np.repeat(np.arange(num_clients), np.maximum(min_rows - sizes, 0))
    if not receivers.size:
        return owner
    shuffled = rng.permutation(len(owner))
    shuffled = shuffled[np.argsort(owner[shuffled], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank_in_client = np.arange(len(owner)) - np.repeat(starts, sizes)
    spare = shuffled[rank_in_client >= min_rows]
    completed = owner.copy()
    completed[rng.permutation(spare)[: receivers.size]] = receivers
    return completed


def _deal(
    num_rows: int,
    shares: npt.NDArray[np.float64],
    min_rows: int,
    rng: np.random.Generator,
    how: How,
) -> Partition:
    """Deal rows by largest remainder, so that the sizes are the shares to within one row."""
    num_clients = len(shares)
    free = num_rows - num_clients * min_rows
    sizes = np.floor(shares * free).astype(np.int64)
    largest = np.argsort(sizes - shares * free, kind="stable")
    sizes[largest[: free - int(sizes.sum())]] += 1
    owner = np.empty(num_rows, np.int64)
    owner[rng.permutation(num_rows)] = np.repeat(np.arange(num_clients), sizes + min_rows)
    return Partition.from_owners(owner, num_clients, how)


def _check_sizes(num_rows: int, num_clients: int, min_rows: int) -> None:
    if num_clients < 1 or min_rows < 1:
        raise PartitionError(
            f"expected at least one client and one row each, got {num_clients} and {min_rows}; raise "
            "federation.num_clients or partition.min_rows"
        )
    if num_clients * min_rows > num_rows:
        raise PartitionError(
            f"expected at least {num_clients * min_rows} rows, {min_rows} for each of {num_clients} clients, got "
            f"{num_rows}; lower federation.num_clients, or use more rows"
        )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise PartitionError(f"partition.{name}: expected a positive number, got {value}; raise it")
