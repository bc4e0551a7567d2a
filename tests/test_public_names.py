"""The library's front door: which names there are, that they are quick to reach, and that their examples run."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
NAMES = {
    "Adapter",
    "FedloomError",
    "LoRAModel",
    "Method",
    "Pair",
    "RowChoice",
    "Sampling",
    "Traits",
    "__version__",
    "aggregate",
    "aggregate_adapters",
    "compare",
    "compress",
    "describe",
    "evaluate",
    "explain",
    "export_adapter",
    "export_merged",
    "generate",
    "load_base",
    "load_peft",
    "load_settings",
    "open_result",
    "register_method",
    "run",
    "save_peft",
    "score_suite",
    "unregister_method",
}


def test_the_public_names_are_these() -> None:
    assert set(fedloom.__all__) == NAMES
    assert set(dir(fedloom)) >= NAMES
    assert {name for name in NAMES if not hasattr(fedloom, name)} == set()


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fedloom.trian


def test_only_the_names_that_are_used_load_torch() -> None:
    program = (
        "import sys, fedloom; dir(fedloom); fedloom.FedloomError; fedloom.load_settings; "
        "fedloom.Method; fedloom.Traits; fedloom.register_method; print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in NAMES if name != "__version__" and f"`{name}" not in text] == []


@pytest.mark.parametrize("module", ["fedloom", "fedloom.methods.combination"])
def test_the_examples_in_docstrings_run(module: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert (failed, attempted > 0) == (0, True)


def test_the_examples_on_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert (failed, attempted > 10) == (0, True)
