"""A natural client that loses all its rows: named, and left out by the setting or by the number of clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom import config
from fedloom.config import Settings
from fedloom.config.client_names import without_clients
from fedloom.errors import DataError, SettingsError
from fedloom.experiment import run

SHORT, LONG = {"instruction": "hi", "response": "yes"}, {"instruction": "hi", "response": "word " * 600}


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    for client, rows in enumerate(([SHORT] * 4, [LONG] * 2, [SHORT] * 3)):
        (tmp_path / f"local_training_{client}.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def settings_of(base: Path, rows: Path, clients: int, **changes: Any) -> Settings:
    document: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "tokenizer": "bytes"},
        "data": {"path": str(rows), "template": "plain", "overlong": "drop"},
        "partition": {"scheme": "natural"},
        "method": {"name": "flora", "ranks": 1},
        "federation": {"num_clients": clients, "num_rounds": 1},
        "training": {"local_steps": 1, "batch_size": 2},
    }
    for name, value in changes.items():
        table, key = name.split("__")
        document[table][key] = value
    return config.resolve(document, "a test")


def holdings(out: Path) -> list[tuple[str, int]]:
    return [(one["name"], one["rank"]) for one in json.loads((out / "holdings.json").read_text())["clients"]]


def test_every_number_of_clients_ends_in_a_run_or_in_advice_that_does(
    base_folder: Path, federation: Path, tmp_path: Path
) -> None:
    wanted = r"expected 2, the clients with a row to train on, got 3: none is left of client 1 .*2 too long"
    with pytest.raises(DataError, match=wanted + r".*set federation\.num_clients = 2, or partition\.empty"):
        run(settings_of(base_folder, federation, 3), tmp_path / "three")
    with pytest.raises(DataError, match=r"got 1: none is left of client 1 .*set federation\.num_clients = 2$"):
        run(settings_of(base_folder, federation, 1), tmp_path / "one")
    with pytest.raises(SettingsError, match=r"expected 3, one per local_training"):
        settings_of(base_folder, federation, 4)
    with pytest.raises(SettingsError, match=r"expected 3, one per local_training"):
        settings_of(base_folder, federation, 2, data__overlong="error")
    run(settings_of(base_folder, federation, 2), tmp_path / "two")
    assert holdings(tmp_path / "two") == [("0", 1), ("2", 1)]


def test_a_client_that_is_left_out_takes_its_settings_with_it_also_when_resumed(
    base_folder: Path, federation: Path, tmp_path: Path
) -> None:
    changes = {"partition__empty": "drop", "method__ranks": [3, 2, 1], "federation__clients_per_round": 3}
    out = tmp_path / "run"
    run(settings_of(base_folder, federation, 3, **changes), out)
    assert holdings(out) == [("0", 3), ("2", 1)]
    longer = settings_of(base_folder, federation, 3, **changes, federation__num_rounds=2)
    assert run(longer, out).num_rounds == 2
    named = settings_of(base_folder, federation, 3, partition__empty="drop", method__ranks={"0": 3, "1": 2, "2": 1})
    assert without_clients(named, ("0", "2"), ("1",)).method.ranks == {"0": 3, "2": 1}
    many = settings_of(base_folder, federation, 3, partition__empty="drop", federation__min_clients=3)
    with pytest.raises(SettingsError, match=r"federation\.min_clients: expected at most the 2 clients"):
        without_clients(many, ("0", "2"), ("1",))
