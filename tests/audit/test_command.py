"""The command: the table, JSON, exit codes, and in one line whatever cannot be audited."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedloom.audit.battery import WIDTH
from fedloom.cli.app import exit_code
from fedloom.methods.traits import Law

PAGE = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
EXACT = """
import torch

print("a line of the module's own")

def exact(adapters, weights, scales):
    print("a line of the function's own")
    total, merged = sum(weights), {}
    for module in adapters[0]:
        parts = zip(adapters, weights, scales)
        merged[module] = sum(w / total * s * one[module][0] @ one[module][1] for one, w, s in parts)
    return merged

def means(adapters, weights, scales):
    shares = [weight / sum(weights) for weight in weights]
    return {
        module: (
            sum(p * s * one[module][0] for one, p, s in zip(adapters, shares, scales)),
            sum(p * one[module][1] for one, p in zip(adapters, shares)),
        )
        for module in adapters[0]
    }

def short(adapters, weights):
    return adapters[0]

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with modules of the user's own, that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_audited.py").write_text(EXACT, encoding="utf-8")
    (tmp_path / "broken_audited.py").write_text("raise RuntimeError('no luck')\n", encoding="utf-8")
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    sys.modules.pop("mine_audited", None)


def test_a_method_that_keeps_what_it_claims_is_a_table_and_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["audit", "fedit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "fedit: every law that it claims holds"
    assert all(sum(f"│ {law} " in line for line in lines) == 1 for law in Law)
    assert len(lines) == len(Law) + 6, "every law has one row"
    assert max(map(len, lines)) <= WIDTH
    assert sum("not claimed" in line for line in lines) == 2


def without_numbers(lines: list[str]) -> list[str]:
    return [" ".join(word for word in line.split() if not re.match(r"[\d.]", word)) for line in lines]


def test_the_page_shows_what_the_command_prints_and_explains_every_law(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(["audit", "fedit"])
    shown = re.findall(r"^```\n(┏.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    assert without_numbers(shown.splitlines()) == without_numbers(capsys.readouterr().out.splitlines())
    assert re.findall(r"^### (.+)$", PAGE, re.MULTILINE) == list(Law)


def test_the_function_of_the_page_keeps_every_law(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (folder / "mine.py").write_text(code, encoding="utf-8")
    assert exit_code(["audit", "mine:aggregate"]) == 0
    del sys.modules["mine"]


@pytest.mark.usefixtures("folder")
def test_a_function_of_the_current_folder_is_audited_and_prints_nothing_into_the_result(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(["audit", "mine_audited:exact", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["subject"] == "mine_audited:exact"
    assert found["broken"] == []
    assert [one["law"] for one in found["laws"]] == list(Law)
    assert found["laws"][0]["off_by"].keys() == {"equal ranks", "ranks 8, 4, 2, 2"}
    assert "a line of the module's own" in printed.err
    assert "a line of the function's own" in printed.err


@pytest.mark.usefixtures("folder")
def test_a_broken_law_is_exit_code_1_unless_it_is_not_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    means = ["audit", "mine_audited:means", "--one-rank"]
    assert exit_code(means) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "mine_audited:means: broken: exactness, rescaling"
    assert exit_code([*means, "--unclaimed", "exactness", "--unclaimed", "rescaling"]) == 0
    assert capsys.readouterr().out.count("not claimed") == 2


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["floar"], "got 'floar'; did you mean flora?"),
        (["base"], "expected a method that aggregates (fedit, "),
        (["flora", "--one-rank"], "--one-rank: expected with module:function only, got method 'flora'; remove"),
        (["flora", "--unclaimed", "exactness"], "--unclaimed: expected with module:function only, got method"),
        (["mine_audited:"], "expected module:function, as in mine:aggregate for mine.py, got 'mine_audited:'; correct"),
        ([":exact"], "expected module:function, as in mine:aggregate for mine.py, got ':exact'; correct"),
        (["mine_audited.py:exact"], "expected module:function, as in mine:aggregate for mine.py"),
        (["some/mine:exact"], "expected module:function, as in mine:aggregate for mine.py"),
        (["no_such_module:exact"], "got ModuleNotFoundError: No module named 'no_such_module'; correct the name"),
        (["mine_audited:no_such"], "got AttributeError: module 'mine_audited' has no attribute 'no_such'; correct"),
        (["broken_audited:exact"], "got RuntimeError: no luck; correct the name or the module"),
        (["mine_audited:number"], "expected a function (adapters, weights, scales), got int; name the function"),
        (["mine_audited:short"], "got one of (adapters, weights); give it these parameters"),
        (["mine_audited:exact", "--unclaimed", "luck"], "--unclaimed: expected a law of exactness, rescaling, "),
    ],
    ids=" ".join,
)
def test_what_cannot_be_audited_is_one_line_and_exit_code_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["audit", *words]) == 2
    printed = capsys.readouterr()
    errors = [one for one in printed.err.splitlines() if one.startswith("error:")]
    assert len(errors) == 1
    assert line in errors[0]
    assert printed.out == ""
