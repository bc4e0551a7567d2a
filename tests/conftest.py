"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["small_settings", "example_runs", "installed_methods"]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real data named by FEDLOOM_DATA; skip where there is none."""
    folder = Path(os.environ.get("FEDLOOM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data absent: set FEDLOOM_DATA (looked in {folder})")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that no worker is left with one at the end; order in files stays."""
    items.sort(key=lambda item: "slow" not in item.keywords)
