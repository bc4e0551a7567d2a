"""The generated pages are what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fedloom.config import every_setting

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document() -> ModuleType:
    spec = importlib.util.spec_from_file_location("document", ROOT / "scripts" / "document.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["settings", "commands"])
def test_the_committed_page_is_what_would_be_generated(document: ModuleType, page: str) -> None:
    committed = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert committed == getattr(document, f"{page}_page")(), "run: python scripts/document.py"


def test_every_setting_is_documented(document: ModuleType) -> None:
    page = document.settings_page()
    assert all(f"* `{name}` (" in page for name, _ in every_setting())
