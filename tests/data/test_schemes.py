from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.data import (
    Partition,
    by_category,
    by_length,
    by_power_law,
    by_size,
    dirichlet,
    iid,
    natural,
    shards,
)
from fedloom.errors import PartitionError

CATEGORIES = st.lists(st.sampled_from("abcd"), min_size=24, max_size=80)
SCHEMES: dict[str, Callable[[Sequence[str], int, int], Partition]] = {
    "iid": lambda labels, clients, seed: iid(len(labels), clients, seed=seed),
    "dirichlet": lambda labels, clients, seed: dirichlet(labels, clients, concentration=0.3, min_rows=2, seed=seed),
    "shards": lambda labels, clients, seed: shards(labels, clients, seed=seed),
    "category": lambda labels, clients, seed: by_category(
        labels, clients, categories_per_client=len(set(labels)), seed=seed
    ),
    "size": lambda labels, clients, seed: by_size(len(labels), clients, concentration=0.3, min_rows=2, seed=seed),
    "power-law": lambda labels, clients, seed: by_power_law(len(labels), clients, exponent=1.2, seed=seed),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@given(labels=CATEGORIES, clients=st.integers(1, 6), seed=st.integers(0, 5))
def test_every_row_has_one_owner_and_the_seed_decides(scheme: str, labels: list[str], clients: int, seed: int) -> None:
    partition, again = (SCHEMES[scheme](labels, clients, seed) for _ in range(2))
    owned = np.concatenate([partition.rows_of(client) for client in range(clients)])
    assert sorted(owned.tolist()) == list(range(len(labels)))
    assert partition.num_clients == clients
    assert partition.sizes.min() >= 1
    assert np.array_equal(partition.rows, again.rows)
    assert np.array_equal(partition.starts, again.starts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_split(scheme: str) -> None:
    labels = list("aabbccdd" * 10)
    splits = {SCHEMES[scheme](labels, 4, seed).owner_of_row().tobytes() for seed in range(3)}
    assert len(splits) == 3


def test_iid_sizes_differ_by_at_most_one() -> None:
    assert sorted(iid(11, 4, seed=1).sizes.tolist()) == [2, 3, 3, 3]


def test_a_small_concentration_separates_categories_and_a_large_one_mixes_them() -> None:
    labels = np.repeat(np.arange(4), 250)

    def largest_share(concentration: float) -> float:
        partition = dirichlet(labels.tolist(), 5, concentration=concentration, seed=3)
        return float(
            np.mean(
                [
                    np.bincount(labels[partition.rows_of(k)]).max() / partition.sizes[k]
                    for k in range(partition.num_clients)
                ]
            )
        )

    assert largest_share(0.05) > 0.7
    assert largest_share(1000.0) < 0.35


def test_dirichlet_fills_clients_up_when_no_draw_does_and_says_so() -> None:
    partition = dirichlet(["a"] * 40, 20, concentration=0.01, min_rows=2, seed=1)
    assert partition.sizes.tolist() == [2] * 20
    assert partition.how["rows_moved"] > 0  # type: ignore[operator]
    assert partition.how["draws"] == 20


def test_dirichlet_draws_again_until_all_have_enough() -> None:
    partition = dirichlet(list("abcdefgh" * 100), 10, concentration=0.1, min_rows=5, seed=2)
    assert partition.how["rows_moved"] == 0
    assert partition.sizes.min() >= 5


def test_two_shards_of_sorted_rows_hold_at_most_four_categories() -> None:
    labels = np.array(list("abcdefgh" * 50))
    partition = shards(labels.tolist(), 10, seed=1)
    assert partition.sizes.tolist() == [40] * 10
    assert max(len(set(labels[partition.rows_of(k)])) for k in range(10)) <= 4


def test_each_client_holds_its_number_of_categories() -> None:
    labels = np.array(list("abcdef" * 30))
    partition = by_category(labels.tolist(), 6, categories_per_client=2, seed=1)
    assert [len(set(labels[partition.rows_of(k)])) for k in range(6)] == [2] * 6


def test_power_law_sizes_fall() -> None:
    sizes = by_power_law(1000, 10, exponent=1.0, seed=1).sizes
    assert (np.diff(sizes) <= 0).all()
    assert sizes[0] == pytest.approx(1 + 990 / sum(1 / k for k in range(1, 11)), abs=1)


def test_by_length_the_first_client_has_the_shortest_rows() -> None:
    lengths = np.array([5, 1, 9, 3, 7, 2])
    partition = by_length(lengths, 3)
    assert [sorted(lengths[partition.rows_of(k)].tolist()) for k in range(3)] == [[1, 2], [3, 5], [7, 9]]


def test_natural_clients_are_the_values_in_order_of_their_names() -> None:
    partition = natural(["z", "a", "z", 7])
    assert partition.names == ("7", "a", "z")
    assert [partition.rows_of(k).tolist() for k in range(3)] == [[3], [1], [0, 2]]


def test_numbers_in_names_of_clients_are_ordered_as_numbers() -> None:
    names = ["site10", "10", "site2", "b", "2", "-1", "2.5", "site2a", "B"]
    assert natural(names).names == ("-1", "2", "2.5", "10", "B", "b", "site2", "site2a", "site10")


@given(st.permutations(["10", "2", "north", "South", "s3", "s12", "02"]), st.data())
def test_natural_clients_keep_their_order_whatever_rows_are_drawn_and_in_which_order(
    names: list[str], data: st.DataObject
) -> None:
    owners = data.draw(st.permutations(names * 3))
    kept = owners[: data.draw(st.integers(1, len(owners)))]
    assert list(natural(kept).names) == [name for name in natural(owners).names if name in kept]
    assert natural(owners).names == ("02", "2", "10", "South", "north", "s3", "s12")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iid(3, 4, seed=1), "expected at least 4 rows, 1 for each of 4 clients, got 3; lower"),
        (lambda: dirichlet("ab" * 5, 4, concentration=1.0, min_rows=3, seed=1), "expected at least 12 rows"),
        (lambda: dirichlet("ab" * 5, 4, concentration=0.0, seed=1), "partition.concentration: expected a positive"),
        (lambda: shards("ab" * 3, 4, seed=1), "expected at least 8 rows"),
        (
            lambda: by_category("abcd", 1, categories_per_client=2, seed=1),
            "got num_clients = 1 with 2 of the 4 categories each",
        ),
        (lambda: by_category("ab", 1, categories_per_client=3, seed=1), "expected 1 to 2"),
        (lambda: natural("aab", 3), "federation.num_clients: expected 2, as many as the data name, got 3"),
        (lambda: iid(3, 0, seed=1), "expected at least one client"),
    ],
)
def test_what_cannot_be_split_is_refused(make: Callable[[], Partition], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        make()


def test_a_hundred_thousand_clients_are_split_in_seconds() -> None:
    labels = (np.arange(300_000) % 8).tolist()
    assert dirichlet(labels, 100_000, concentration=0.5, seed=1).sizes.min() == 1
    assert by_category(labels, 100_000, categories_per_client=2, seed=1).num_clients == 100_000
