"""Packages with methods of their own, put where Python finds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedloom.methods import table


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that installs, into the test's folder, a package of one module with entry points."""
    before = set(sys.modules)

    def put(package: str, code: str, *entries: str) -> None:
        (tmp_path / f"{package}.py").write_text(code, encoding="utf-8")
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("[fedloom.methods]\n" + "\n".join(entries) + "\n")
        table._installed.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    table._installed.cache_clear()
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[module]
