from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedloom.data import Division, Rows, Scheme, TokenSet, divide
from fedloom.errors import PartitionError

ROWS = Rows(
    [{"category": "ab"[i % 2], "site": i % 3} for i in range(12)],
    ("local_training_4.json", "local_training_9.json"),
    np.repeat([0, 1], 6),
    np.arange(12),
)
TOKENS = TokenSet.from_rows(([0] * (i + 1), [True] * (i + 1)) for i in range(12))


@pytest.mark.parametrize("scheme", [s for s in Scheme if s is not Scheme.NATURAL])
def test_every_scheme_can_be_named(scheme: Scheme) -> None:
    partition = divide(Division(scheme, num_clients=3, column="category"), ROWS, TOKENS, seed=1)
    assert (partition.num_clients, partition.how["scheme"]) == (3, scheme)


def test_natural_clients_are_the_files_or_the_values_of_a_column() -> None:
    assert divide(Division(Scheme.NATURAL), ROWS, TOKENS, seed=1).names == ("4", "9")
    assert divide(Division(Scheme.NATURAL, column="site"), ROWS, TOKENS, seed=1).names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("division", "message"),
    [
        (Division(Scheme.IID), "federation.num_clients: expected a number .*, got none"),
        (
            Division(Scheme.DIRICHLET, 3),
            r"partition.column: expected a column .*, got none; set it to one of 'category', 'site\'",
        ),
        (Division(Scheme.DIRICHLET, 3, column="topic"), "expected a column 'topic', found category, site"),
        (Division(Scheme.DIRICHLET, 3, column="categry"), "did you mean 'category'. fill the row"),
        (Division(Scheme.NATURAL, 3), "expected 2, as many as the data name, got 3"),
    ],
)
def test_what_is_missing_is_named(division: Division, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divide(division, ROWS, TOKENS, seed=1)


def test_rows_that_were_not_the_encoded_ones_are_refused() -> None:
    with pytest.raises(PartitionError, match="12 rows and 2 encoded"):
        divide(Division(Scheme.IID, 2), ROWS, TOKENS.select([0, 1]), seed=1)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_rows_of_one_person_are_dealt_together_and_natural_ones_stay_where_they_are(scheme: Scheme) -> None:
    rows = replace(ROWS, grouped=np.arange(12) % 4)
    owner = divide(
        Division(scheme, num_clients=2, column=None if scheme is Scheme.NATURAL else "category"), rows, TOKENS, seed=1
    )
    owners = [set(owner.owner_of_row()[rows.grouped == one].tolist()) for one in range(4)]
    assert [len(one) for one in owners] == [2 if scheme is Scheme.NATURAL else 1] * 4


def test_where_every_row_is_its_own_unit_nothing_changes() -> None:
    division = Division(Scheme.SIZE, num_clients=3)
    plain = divide(division, ROWS, TOKENS, seed=1)
    alone = divide(division, replace(ROWS, grouped=np.arange(12)), TOKENS, seed=1)
    assert np.array_equal(plain.rows, alone.rows)
