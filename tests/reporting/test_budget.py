"""Budgets are counted from the records, and what is not equal is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.config import Settings
from fedloom.experiment import run
from fedloom.reporting.budget import unequal_rows, with_rows_trained
from fedloom.reporting.metrics import ROWS_TRAINED
from fedloom.reporting.tables import compare
from fedloom.run_folder.reader import StoredRun, read_run

Make = Callable[..., Settings]


def stored(method: str, *clients: tuple[int, int], batch_size: int = 4) -> StoredRun:
    records = ({"round": 1, "clients": [{"num_rows": rows, "num_steps": steps} for rows, steps in clients]},)
    config = {"method": {"name": method}, "training": {"batch_size": batch_size}}
    return StoredRun(Path("x"), config, {}, records, (), None)


@pytest.mark.parametrize(
    ("run", "rows"),
    [
        (stored("fedit", (10, 3), (10, 2)), 10 + 8),
        (stored("fedit", (10, 4), (3, 5), (0, 0)), 14 + 15),
        (stored("a-method-of-ones-own", (10, 3)), 10),
        (stored("splitlora", (10, 3)), 12),
    ],
)
def test_rows_trained_on_follow_from_rows_steps_and_batch(run: StoredRun, rows: int) -> None:
    assert ROWS_TRAINED.of_run(with_rows_trained(run)) == rows


def test_a_run_that_says_nothing_of_its_steps_has_no_count() -> None:
    silent = stored("fedit")
    assert with_rows_trained(silent) == list(silent.records)
    assert with_rows_trained(replace(silent, config={})) == list(silent.records)


@pytest.mark.parametrize("method", ["fedit", "centralised"])
def test_a_runs_count_is_what_it_was_asked_for(method: str, settings_for: Make, tmp_path: Path) -> None:
    settings: Any = {"method__name": method, "method__ranks": 2, "data__eval_rows": None, "data__max_rows": 48}
    run(settings_for(**settings, partition__scheme="iid", partition__column=None), tmp_path / "run")
    assert ROWS_TRAINED.of_run(with_rows_trained(read_run(tmp_path / "run"))) == 2 * 3 * 2 * 4


def test_methods_that_trained_on_other_numbers_of_rows_are_named() -> None:
    def table(**rows: float) -> Any:
        return compare({name: {1: {"rows_trained": count}} for name, count in rows.items()}, [ROWS_TRAINED])

    assert unequal_rows(table(fedit=1000, flora=1010)) is None
    told = unequal_rows(table(flora=3000, fedit=1000))
    assert told is not None
    assert told.endswith("not at equal budget: fedit 1,000, flora 3,000")
    assert unequal_rows(compare({"base": {1: {}}}, [ROWS_TRAINED])) is None
