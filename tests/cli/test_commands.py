"""Commands: what goes to which stream, and the exit codes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fedloom
from fedloom import recipes
from fedloom.cli.app import exit_code
from fedloom.cli.experiments import load_settings
from fedloom.errors import RunError


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ran:
        code = exit_code(list(arguments))
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "mine.toml"
    file.write_text("[training]\nlocal_steps = 5\n", encoding="utf-8")
    return str(file)


class Result:
    """Stands for what the experiment returns."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def as_dict(self) -> dict[str, Any]:
        return self.values

    def lines(self) -> list[str]:
        return [f"{name} {value}" for name, value in self.values.items()]


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("fedloom.experiment")
    module.__dict__.update(
        describe=lambda settings, *, num_rows: Result(rounds=settings.federation.num_rounds),
        run=lambda settings, out, *, fresh, progress: Result(out=str(out), fresh=fresh, seed=settings.run.seed),
        compare=lambda settings, methods, seeds, out, *, reference, progress, **others: Result(
            methods=methods, seeds=seeds, out=str(out), reference=reference, **others
        ),
    )
    monkeypatch.setitem(sys.modules, "fedloom.experiment", module)
    monkeypatch.setattr(fedloom, "experiment", module, raising=False)
    return module


def test_no_command_shows_the_help(invoke: Any) -> None:
    ran = invoke()
    assert ran.code == 0
    assert "validate" in ran.out


def test_a_valid_recipe_is_said_to_be_on_standard_output(invoke: Any, recipe: str) -> None:
    ran = invoke("validate", recipe)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{recipe} is valid: fedit, rank 8")


def test_a_round_before_training_is_told_apart(invoke: Any) -> None:
    ran = invoke("validate")
    assert "1 of 10 clients a round, 1 round for the start and 300 of training, base embedded" in ran.out


def test_problems_go_to_standard_error_one_line_each_with_code_2(invoke: Any, recipe: str) -> None:
    ran = invoke("validate", recipe, "--set", "run.sed=1", "--set", "wire.dtype=fp64")
    assert (ran.code, ran.out) == (2, "")
    assert [line.split()[:2] for line in ran.err.splitlines()] == [["error:", "wire.dtype:"], ["error:", "run.sed:"]]


def test_validate_prints_json_whether_valid_or_not(invoke: Any, recipe: str) -> None:
    good = json.loads(invoke("validate", recipe, "--json").out)
    assert good["valid"]
    assert good["settings"]["training"]["local_steps"] == 5
    bad = invoke("validate", recipe, "--json", "--set", "run.seed=x")
    assert bad.code == 2
    assert json.loads(bad.out)["problems"][0].startswith("run.seed: expected an integer ≥ 0")


def test_a_shipped_recipe_is_found_by_name(invoke: Any) -> None:
    assert invoke("validate", "flora-hetero-dolly").code == 0


def test_a_name_that_is_no_recipe_is_refused(invoke: Any) -> None:
    ran = invoke("run", "flora-hetro-dolly")
    assert ran.code == 2
    assert "did you mean flora-hetero-dolly?" in ran.err


@pytest.mark.parametrize("arguments", [["run", "x", "--bad"], ["run", "--bad"], ["nonsense"], ["compare", "--seeds"]])
def test_a_mistyped_command_is_one_line_with_code_2(invoke: Any, arguments: list[str]) -> None:
    ran = invoke(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--methods", "fedit,flroa"],
        ["--methods", "fedit,fedit"],
        ["--methods", ""],
        ["--seeds", "1,x"],
        ["--seeds", "1,1"],
        ["--seeds", "-1"],
    ],
    ids=str,
)
def test_methods_and_seeds_are_checked_before_anything_starts(invoke: Any, recipe: str, options: list[str]) -> None:
    ran = invoke("compare", recipe, *options)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {options[0]}: expected")


@pytest.mark.usefixtures("experiment")
def test_run_hands_over_settings_and_folder_and_prints_the_result(invoke: Any, recipe: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ran = invoke("run", recipe, "--set", "run.seed=4", "--out", out, "--fresh", "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == {"out": out, "fresh": True, "seed": 4}
    assert out in ran.err


@pytest.mark.usefixtures("experiment")
def test_the_folder_is_named_after_the_recipe_unless_told_otherwise(invoke: Any, recipe: str) -> None:
    assert f"out {Path('runs/fedit-dolly')}" in invoke("run", "fedit-dolly").out
    assert f"out {Path('runs/mine')}" in invoke("run", recipe).out
    assert f"out {Path('runs/mine-compared')}" in invoke("compare", recipe).out


@pytest.mark.usefixtures("experiment")
def test_compare_hands_over_methods_and_seeds(invoke: Any, recipe: str) -> None:
    ran = invoke("compare", recipe, "--methods", "fedit, flora", "--seeds", "1,2", "--reference", "flora", "--json")
    assert json.loads(ran.out)["methods"] == ["fedit", "flora"]
    assert json.loads(ran.out)["reference"] == "flora"
    assert json.loads(ran.out)["seeds"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--set", "method.name=flora", "--methods", "fedit"], "--methods names the methods"),
        (["--set", "run.seed=9", "--seeds", "1"], "--seeds names the seeds"),
        (["--set", "method.name=flora", "--set", "method.broadcast=compressed", "--methods", "flora,fedit"], None),
    ],
    ids=str,
)
@pytest.mark.usefixtures("experiment")
def test_compare_refuses_what_it_would_ignore(
    invoke: Any, recipe: str, options: list[str], problem: str | None
) -> None:
    ran = invoke("compare", recipe, *options)
    assert (ran.code, problem is None or problem in ran.err) == (0 if problem is None else 2, True), ran.err


@pytest.mark.usefixtures("experiment")
def test_compare_hands_over_what_is_set_for_one_method_and_what_is_to_be_chosen(invoke: Any, recipe: str) -> None:
    own, grid = "flora:federation.num_rounds=3", ["training.learning_rate=1e-3,2e-3", "flora:server.learning_rate=1,2"]
    options = [part for one in (own, "training.batch_size=2") for part in ("--set", one)]
    options += [part for one in grid for part in ("--grid", one)]
    ran = invoke("compare", recipe, "--methods", "fedit,flora", *options, "--tune-seed", "4", "--json")
    found = json.loads(ran.out)
    assert (found["overrides"], found["grid"], found["tune_seed"]) == ([own], grid, 4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--set", "fedti:training.batch_size=2"], "--set fedti:training.batch_size=2: expected one of the methods"),
        (["--grid", "data.max_rows=1,2"], "--grid data.max_rows=1,2: expected a setting of [method]"),
        (
            ["--set", "training.batch_size=2", "--grid", "training.batch_size=2,4"],
            "--grid training.batch_size=2,4: expected no --set training.batch_size besides, got both",
        ),
        (["--tune-seed", "2"], "--tune-seed: expected a --grid with several points"),
        (["--tune-seed", "x", "--grid", "training.batch_size=2,4"], "--tune-seed"),
    ],
    ids=str,
)
def test_what_one_method_cannot_have_is_one_line(invoke: Any, recipe: str, options: list[str], problem: str) -> None:
    ran = invoke("compare", recipe, "--methods", "fedit,flora", *options)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert problem in ran.err


@pytest.mark.usefixtures("experiment")
def test_compare_takes_the_recipes_own_seed(invoke: Any, recipe: str) -> None:
    ran = invoke("compare", recipe, "--methods", "fedit", "--set", "run.seed=9", "--json")
    assert json.loads(ran.out)["seeds"] == [9]


def test_settings_load_in_python_without_overrides_with_one_and_with_several(recipe: str) -> None:
    assert load_settings(Path(recipe)) == load_settings(recipe, None)
    assert load_settings(recipe, "run.seed=4") == load_settings(recipe, ["run.seed=4"])
    assert load_settings(recipe, "run.seed=4").run.seed == 4


@pytest.mark.usefixtures("experiment")
def test_describe_prints_lines(invoke: Any, recipe: str) -> None:
    assert invoke("describe", recipe).out == "rounds 10\n"


def raising(error: BaseException) -> Any:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def test_our_errors_are_one_line_with_code_2(invoke: Any, recipe: str, experiment: Any) -> None:
    experiment.run = raising(RunError("runs/x: expected an empty folder, got files; choose another"))
    ran = invoke("run", recipe)
    assert (ran.code, ran.err) == (2, "error: runs/x: expected an empty folder, got files; choose another\n")


def test_an_interruption_is_code_130_and_says_what_to_do(invoke: Any, recipe: str, experiment: Any) -> None:
    experiment.run = raising(KeyboardInterrupt())
    ran = invoke("run", recipe)
    assert ran.code == 130
    assert "run the same command again to resume" in ran.err


def test_other_errors_keep_their_traceback(invoke: Any, recipe: str, experiment: Any) -> None:
    experiment.run = raising(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        invoke("run", recipe)


def test_recipes_are_listed_for_people_and_programs(invoke: Any) -> None:
    assert all(name in invoke("recipes").out for name in recipes.names())
    listed = json.loads(invoke("recipes", "--json").out)
    assert [recipe["name"] for recipe in listed] == recipes.names()
    assert all(recipe["expect"] for recipe in listed)


def test_a_copied_recipe_is_valid_and_its_path_is_the_result(invoke: Any, tmp_path: Path) -> None:
    copied = invoke("recipes", "copy", "flora-hetero-dolly", "--to", str(tmp_path / "mine.toml"))
    assert copied.out.strip() == str(tmp_path / "mine.toml")
    assert invoke("validate", copied.out.strip()).code == 0
    again = invoke("recipes", "copy", "flora-hetero-dolly", "--to", str(tmp_path / "mine.toml"))
    assert again.code == 2
