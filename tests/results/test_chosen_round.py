"""The model after any round that is kept, for every command that takes a result; what is not kept is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.errors import RunError
from fedloom.experiment import run
from fedloom.lora.peft_files import load_peft
from fedloom.results.export import export_adapter
from fedloom.results.held_out import evaluate
from fedloom.results.opened_result import find_result, open_result

Make = Callable[..., Settings]
KINDS: dict[str, dict[str, Any]] = {
    "flora": {},
    "fedsa-lora": {"method__ranks": 2},
    "centralised": {"method__ranks": 2},
    "splitlora": {"method__ranks": 2, "split__cut_layer": 1, "split__aggregate_every": 2},
}


@pytest.mark.parametrize("method", KINDS)
def test_a_round_is_the_result_of_a_run_that_ends_there(method: str, settings_for: Make, tmp_path: Path) -> None:
    given = {"method__name": method, **KINDS[method]}
    run(settings_for(**given, federation__num_rounds=2, run__keep_states="all"), tmp_path / "two")
    run(settings_for(**given, federation__num_rounds=1), tmp_path / "one")
    first, alone = find_result(tmp_path / "two", 1).adapters, find_result(tmp_path / "one").adapters
    assert first.keys() == alone.keys()
    for name, adapter in alone.items():
        for module, pair in adapter.items():
            torch.testing.assert_close(first[name][module].delta(), pair.delta(), rtol=1e-5, atol=1e-7)
    last, whole = find_result(tmp_path / "two", 2).adapters, find_result(tmp_path / "two").adapters
    for name, adapter in whole.items():
        for module, pair in adapter.items():
            torch.testing.assert_close(last[name][module].delta(), pair.delta(), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def three(kept: Path, settings_for: Make) -> Path:
    """Return the folder of a run of three rounds, of which the last two and the best are kept."""
    if not kept.exists():
        run(settings_for(federation__num_rounds=3, run__keep_states="best"), kept)
    return kept


def record_of(folder: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[number - 1])
    return found


def test_a_round_scores_what_its_record_says(three: Path) -> None:
    measured = evaluate(open_result(three, round=2))
    assert measured.mean_nats == pytest.approx(record_of(three, 2)["eval"]["loss_nats"], rel=1e-5)


def test_an_exported_round_carries_its_own_figures(three: Path, tmp_path: Path) -> None:
    export_adapter(three, tmp_path / "out", round="2")
    card = (tmp_path / "out/README.md").read_text()
    assert "| rounds | 2 |" in card
    assert f"| held-out loss | {record_of(three, 2)['eval']['loss_nats']:.4f} nats per token |" in card
    found = find_result(three, 2).adapters["result"]
    torch.testing.assert_close(
        {name: pair.delta() for name, pair in load_peft(tmp_path / "out").items()},
        {name: pair.delta() for name, pair in found.items()},
    )


def test_the_best_is_that_of_the_lowest_loss(three: Path) -> None:
    losses = [record_of(three, number)["eval"]["loss_nats"] for number in (1, 2, 3)]
    found = find_result(three, "best").run
    assert found is not None
    assert len(found.records) == losses.index(min(losses)) + 1


def test_every_command_takes_a_round_and_names_what_is_wrong(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(three, folder)
    shutil.rmtree(folder / "rounds/1/state", ignore_errors=True)
    commands = (
        ["evaluate", str(folder)],
        ["generate", str(folder), "--prompt", "red", "--max-new-tokens", "1"],
        ["export", str(folder), "--to", str(tmp_path / "out")],
    )
    for command in commands:
        for asked, said in (
            ("1", "expected a round whose state"),
            ("4", "expected best, or 1 to 3"),
            ("last", "expected best, or 1 to 3"),
        ):
            assert exit_code([*command, "--round", asked]) == 2
            assert said in capsys.readouterr().err
        assert exit_code([*command, "--round", "3"]) == 0
    capsys.readouterr()
    assert exit_code(["evaluate", str(folder / "adapter"), "--round", "1"]) == 2
    assert "is an adapter; drop --round" in capsys.readouterr().err


def test_without_a_loss_there_is_no_best_round(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(data__eval_rows=None, federation__num_rounds=1), tmp_path / "run")
    with pytest.raises(RunError, match="hold rows out"):
        find_result(tmp_path / "run", "best")


def test_a_result_chosen_on_validation_rows_is_scored_on_the_held_out_ones(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(federation__num_rounds=1, data__validation_fraction=0.2), tmp_path / "run")
    measured = evaluate(open_result(tmp_path / "run"))
    run(settings_for(federation__num_rounds=1), tmp_path / "plain")
    assert measured.as_dict()["data_sha256"] == evaluate(open_result(tmp_path / "plain")).as_dict()["data_sha256"]
    run(settings_for(federation__num_rounds=1, data__validation_fraction=0.2, data__eval_rows=None), tmp_path / "only")
    assert evaluate(open_result(tmp_path / "only")).as_dict()["data"] == "the run's validation rows"


def test_states_are_kept_as_recipes_said_earlier(settings_for: Make) -> None:
    assert [settings_for(run__keep_states=given).run.keep_states for given in (True, False)] == ["all", "last"]
