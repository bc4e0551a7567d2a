"""Whose the clients of a description are: those of a column's values, where the rows are on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.config import Settings
from fedloom.errors import PartitionError
from fedloom.experiment import run
from fedloom.preview.description import describe


@pytest.fixture
def path(tmp_path: Path) -> str:
    sites = ("south", "north", "west")
    rows = [{"instruction": "say", "context": "", "response": "yes", "site": site} for site in sites * 4]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return str(tmp_path / "rows.json")


Make = Callable[..., Settings]
BY_SITE = {"partition__scheme": "natural", "partition__column": "site", "data__eval_rows": None}


def test_the_clients_are_named_by_the_column(path: str, settings_for: Make) -> None:
    described = describe(settings_for(data__path=path, method__ranks={"north": 2, "south": 1, "west": 2}, **BY_SITE))
    assert described.names == ("north", "south", "west")
    assert described.client_ranks == (2, 1, 2)


def test_another_number_of_clients_is_refused_as_by_a_run(path: str, settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(data__path=path, method__ranks=2, federation__num_clients=10, **BY_SITE)
    with pytest.raises(PartitionError, match="expected 3, as many as the data name, got 10") as described:
        describe(settings)
    with pytest.raises(PartitionError) as refused:
        run(settings, tmp_path / "run")
    assert str(refused.value) == str(described.value)


def test_where_clients_may_lose_their_rows_nobody_knows_before_they_are_read(path: str, settings_for: Make) -> None:
    settings = settings_for(
        data__path=path, data__overlong="drop", method__ranks=2, federation__num_clients=2, **BY_SITE
    )
    described = describe(settings)
    assert described.names is None
    assert "whether a run has federation.num_clients = 2 of them is known once they are read" in "\n".join(
        described.lines()
    )


def test_rows_that_are_not_here_name_nobody(settings_for: Make) -> None:
    described = describe(settings_for(data__path="org/name", **BY_SITE))
    assert described.names is None
    assert "The rows name the clients" in "\n".join(described.lines())
