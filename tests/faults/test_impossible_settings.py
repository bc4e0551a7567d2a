"""Numbers that no run could reach are refused or answered at once; the least number of rows acts in every scheme."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest

from fedloom import config, load_settings
from fedloom.cli.app import exit_code
from fedloom.config.checks import LARGEST_POPULATION
from fedloom.data.division import Division, Scheme, divide
from fedloom.data.sources import Rows
from fedloom.data.tokens import TokenSet
from fedloom.errors import PartitionError, SettingsError
from fedloom.lora.pair import rank_in
from fedloom.preview import description, message_sizes


@pytest.mark.parametrize(
    "override",
    [
        "training.local_steps=100000000000000000000",
        "training.local_steps=1e20",
        "training.batch_size=10000000000",
        "federation.num_rounds=999999999999",
        "federation.num_clients=100000000",
        "method.ranks=1000000000000",
        "method.ranks=[4, 1000000000000]",
        "method.alpha=1e300",
        "training.learning_rate=1e300",
        "partition.min_rows=1000000000000000",
        "data.max_length=99999999999999999999",
        "run.seed=99999999999999999999999",
    ],
)
@pytest.mark.parametrize("command", ["validate", "describe"])
def test_an_absurd_number_is_refused_by_name_at_once(
    command: str, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert exit_code([command, "demo", "--set", override]) == 2
    assert time.monotonic() - started < 5
    assert f"error: {override.partition('=')[0]}: expected " in capsys.readouterr().err


def test_the_largest_population_is_described_at_once_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [
        f"federation.num_clients={LARGEST_POPULATION}",
        "method.name=flora",
        "method.ranks=4",
        "data.max_rows=",
    ]
    with_many, calls = load_settings("demo", overrides), list[int]()
    for module in (description, message_sizes):
        monkeypatch.setattr(module, "rank_in", lambda shape, rank: calls.append(rank) or rank_in(shape, rank))
    lines = description.describe(with_many).lines()
    assert len(calls) < 1000, "something is counted for each client and module"
    assert len(lines) < 50
    assert any(line.lstrip().startswith(f"0–{LARGEST_POPULATION - 1} ") for line in lines)


def test_a_stack_that_is_measured_in_part_has_the_bytes_of_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings("demo", ["method.name=flora", "method.ranks=4"])
    whole = description.describe(settings).download_bytes
    monkeypatch.setattr(message_sizes, "MEASURED_NUMBERS", 2**16)
    in_part = description.describe(settings).download_bytes
    assert in_part == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_the_least_number_of_rows_acts_in_every_scheme(scheme: Scheme) -> None:
    categories = ["a"] * 30 + ["b"] * 6 + ["c"] * 4
    rows = Rows([{"category": name} for name in categories], ("rows.jsonl",), np.zeros(40, np.int64), np.arange(1, 41))
    tokens = TokenSet.from_rows([([1, 2, 3], [False, True, True])] * 40)
    clients = 3 if scheme is Scheme.NATURAL else 4
    for least in (2, 4, 9, 10):
        smallest = 0
        with contextlib.suppress(PartitionError):
            partition = divide(Division(scheme, clients, "category", min_rows=least), rows, tokens, seed=1)
            smallest = min(len(partition.rows_of(client)) for client in range(clients))
        assert smallest == 0 or smallest >= least
    with pytest.raises(PartitionError, match="expected"):
        divide(Division(scheme, clients, "category", min_rows=14), rows, tokens, seed=1)


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(SettingsError, match=r"federation\.num_rounds: expected at most 1,000,000,000"):
        load_settings("demo", ["federation.num_rounds=1000000001"])


@pytest.mark.parametrize(
    "extra", [{"../x": 1.5}, {"a.b": {"c": 1}}, {"data": {"path": "x" * 5000}}, {"data": {"a.b": 1}}]
)
def test_a_table_with_a_dot_in_its_name_and_a_name_too_long_are_refused(extra: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"expected (one of the tables|a setting of|a file or folder)"):
        config.resolve(extra, "a test")
