"""A preflight that reads rows: all that a run would refuse of them, and only that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.errors import FedloomError
from fedloom.experiment import run
from fedloom.preview.row_check import check_rows

Make = Callable[..., Settings]
LONG, EMPTY, GOOD = {"response": "long " * 40}, {"response": " "}, {"response": "red"}


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes two rows of each of three categories and some others, and names the file."""

    def write(*others: dict[str, Any]) -> str:
        plain = [{"instruction": "say", "context": "", "category": name, **GOOD} for name in "aabbcc"]
        path = tmp_path / "rows.json"
        path.write_text(
            json.dumps([*plain, *({"instruction": "x", "context": "", "category": "a"} | o for o in others)])
        )
        return str(path)

    return write


def checked(make: Make, path: str, **changes: Any) -> tuple[str, ...]:
    natural = {"partition__scheme": "natural", "partition__categories_per_client": 2, "data__eval_rows": None}
    settings = make(data__path=path, data__max_length=64, **natural | changes)
    return check_rows(settings, Path("nowhere")).problems


def test_rows_that_are_fine_are_told_and_nothing_is_in_the_way(rows: Callable[..., str], settings_for: Make) -> None:
    settings = settings_for(data__path=rows(), partition__scheme="natural", data__eval_rows=None)
    found = check_rows(settings, Path("nowhere"))
    assert (found.problems, found.unknown) == ((), ())
    assert "6 rows of" in "\n".join(found.found)
    assert "3 clients of 2 rows" in "\n".join(found.found)


def test_every_kind_is_named_at_once_and_counted(rows: Callable[..., str], settings_for: Make) -> None:
    path = rows(LONG, EMPTY, EMPTY, LONG)
    problems = checked(settings_for, path, federation__num_clients=2, method__ranks=[2, 1])
    unanswered, overlong, clients = problems
    assert "expected an answer, found none" in unanswered
    assert "2 of 10 rows have none" in unanswered
    assert "data.max_length is 64 (2 of 8 rows are longer" in overlong
    assert clients.startswith("without such rows: federation.num_clients: expected 3")
    assert "give 3 values in method.ranks" in clients


@pytest.mark.parametrize(
    ("others", "changes"),
    [
        ((), {"federation__num_clients": 4, "method__ranks": 2}),
        ((LONG,), {}),
        ((EMPTY,), {}),
        ((LONG,), {"data__overlong": "drop", "federation__num_clients": 4, "method__ranks": 2}),
        ((), {"partition__column": "no_such_column"}),
        ((), {"data__shape": "alpaca"}),
    ],
)
def test_one_problem_is_the_one_a_run_would_end_with(
    others: tuple[dict[str, Any], ...],
    changes: dict[str, Any],
    rows: Callable[..., str],
    settings_for: Make,
    tmp_path: Path,
) -> None:
    path = rows(*others)
    (problem,) = checked(settings_for, path, **changes)
    natural = {"partition__scheme": "natural", "data__eval_rows": None, "data__max_length": 64}
    with pytest.raises(FedloomError) as raised:
        run(settings_for(data__path=path, **natural | changes), tmp_path / "run")
    assert str(raised.value) == problem


def test_advice_on_length_never_goes_beyond_the_bases_context(rows: Callable[..., str], settings_for: Make) -> None:
    endless = {"response": "very long " * 400}
    (problem,) = checked(settings_for, rows(endless))
    assert "at most (the base's context), and set data.overlong" in problem


def test_the_command_prints_a_line_per_problem(
    rows: Callable[..., str], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'[model]\nbase = "{base_folder}"\ntokenizer = "bytes"\n'
        f'[data]\npath = "{rows(LONG, EMPTY)}"\nshape = "dolly"\ntemplate = "plain"\nmax_length = 64\n'
        '[method]\nname = "fedit"\nranks = 2\n[federation]\nnum_rounds = 1\nnum_clients = 3\n'
        "[training]\nlocal_steps = 1\nbatch_size = 2\n"
    )
    assert exit_code(["validate", str(recipe), "--data"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True, True]
    dropped = ["--set", "data.overlong=drop", "--set", "data.unanswered=drop"]
    assert exit_code(["validate", str(recipe), "--data", *dropped]) == 0
    assert "rows as tokens: 6 rows" in capsys.readouterr().out
    assert exit_code(["validate", str(recipe), "--data", "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2
