"""One notebook per method: as the script writes it, in the notebook format, and it runs from top to bottom."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.methods import table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
QUICK = "flora"


def script() -> Any:
    specification = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_notebooks_are_those_that_the_script_writes() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(table.shipped())
    for method in table.shipped():
        assert (FOLDER / f"{method}.ipynb").read_text(encoding="utf-8") == script().text_of(method), method


def shown_by(method: str) -> list[Any]:
    """Run a notebook's cells in one namespace and return what each would show: the value of its last expression."""
    namespace: dict[str, Any] = {}
    shown = []
    for cell in json.loads((FOLDER / f"{method}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        *before, last = "".join(cell["source"]).rstrip().split("\n")
        try:
            value = compile(last, method, "eval")
        except SyntaxError:
            exec("\n".join([*before, last]), namespace)  # noqa: S102
            continue
        exec("\n".join(before), namespace)  # noqa: S102
        shown.append(eval(value, namespace))
    return shown


def check(method: str) -> None:
    described, result, *others = shown_by(method)
    assert "memory: about" in described._repr_html_()
    assert "held-out loss" in result._repr_html_()
    if others:
        assert others[0] < 0.0  # better than the base


def test_a_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in table.shipped() if name != QUICK])
def test_every_notebook_runs_from_top_to_bottom(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(method)
