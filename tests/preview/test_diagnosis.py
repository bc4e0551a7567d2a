"""The doctor: what is here, and what of a recipe is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom import config
from fedloom.assembly.preparation import Preparation
from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.preview.diagnosis import Diagnosis, diagnose, findings, this_machine
from fedloom.preview.rehearsal import Finding, SketchWorkshop, Verdict

Make = Callable[..., Settings]


def found(settings: Settings, **machine: object) -> dict[str, Finding]:
    here = replace(this_machine(), **machine)
    prepared = Preparation(settings, Path("no-such-run"), SketchWorkshop())
    return {finding.need: finding for finding in findings(prepared, here)}


def test_a_machine_has_versions_a_cpu_memory_and_cores() -> None:
    machine = this_machine()
    assert machine.devices[0] == "cpu"
    assert 0 < machine.free_memory_bytes <= machine.memory_bytes
    assert {"python", "torch", "transformers", "peft", "fedloom"} <= machine.versions.keys()
    assert machine.extras
    assert "dev" not in machine.extras


def test_a_recipe_whose_files_are_here_would_run(settings_for: Make) -> None:
    diagnosis = diagnose("mine", settings_for())
    assert diagnosis.would_run
    assert diagnosis.summary == "would run here"
    assert {finding.verdict for finding in diagnosis.findings} == {Verdict.YES}


def test_too_little_memory_is_said_with_both_numbers(settings_for: Make) -> None:
    memory = found(settings_for(), free_memory_bytes=10_000)["memory"]
    assert memory.verdict is Verdict.NO
    assert "10 kB free" in memory.why


def settings_without_files(**tables: dict[str, object]) -> Settings:
    return config.resolve(tables, "a test", also=())


def test_every_thing_in_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.models.load.find_spec", lambda name: None)
    settings = settings_without_files(
        model={"base": str(tmp_path / "absent"), "device": "cuda:9", "quantization": "4bit"},
        data={"path": "absent.json"},
    )
    needs = found(settings)
    against = {need for need, finding in needs.items() if finding.verdict is Verdict.NO}
    assert {"model.base", "data.path", "device cuda:9", "quantization 4bit"} <= against
    assert "pip install 'fedloom[quantized]'" in needs["quantization 4bit"].why
    assert needs["memory"].verdict is Verdict.UNKNOWN
    assert not Diagnosis(this_machine(), "x", tuple(needs.values())).would_run


def test_what_only_the_hub_has_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    settings = settings_without_files(
        model={"base": "some/absent-model"}, data={"path": "some/absent-rows", "eval_rows": 5}
    )
    needs = found(settings)
    assert needs["base some/absent-model"].verdict is Verdict.UNKNOWN
    assert needs["data some/absent-rows"].verdict is Verdict.UNKNOWN
    assert diagnose("x", settings).summary == "no obstacle found, but not everything could be checked"


def test_a_base_without_weights_would_not_run(settings_for: Make, tmp_path: Path, base_folder: Path) -> None:
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text((base_folder / "config.json").read_text())
    assert found(settings_for(model__base=str(hollow)))[f"base {hollow}"].verdict is Verdict.NO


def test_the_command_exits_with_2_where_the_recipe_would_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\nbase = "./absent"\n[training]\nlocal_steps = 2\n', encoding="utf-8")
    assert exit_code(["doctor", str(recipe)]) == 2
    assert f"{recipe}: would not run here" in capsys.readouterr().out
    assert exit_code(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["machine"]["devices"][0] == "cpu"
    assert printed["findings"] == []


def test_an_own_method_is_listed_and_a_broken_one_is_named_with_what_to_do(install: Callable[..., None]) -> None:
    assert not this_machine().methods
    assert not this_machine().faults
    install(
        "foreign_good",
        "from fedloom import Method, Traits\n"
        "METHOD = Method(Traits('theirs', 'from a package'), 'fedloom.methods.makers:flora')\n",
        "theirs = foreign_good:METHOD",
    )
    install("foreign_bad", "METHOD = 3", "broken = foreign_bad:METHOD")
    lines = diagnose().lines()
    assert "methods besides the shipped ones: theirs" in lines
    assert (
        "method broken of the package foreign_bad cannot be used: expected foreign_bad:METHOD to be a Method, got int; "
        "correct its entry point"
    ) in lines
