"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
from installed_extras import absent

os.environ["FEDLOOM_CACHE"] = "off"  # a test keeps nothing outside its folder, and finds nothing there

hypothesis.settings.register_profile("untimed", deadline=None)  # how long a case takes says how busy the machine is
hypothesis.settings.load_profile("untimed")

pytest_plugins = ["small_settings", "example_runs", "installed_methods"]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real data named by FEDLOOM_DATA; skip where there is none."""
    folder = Path(os.environ.get("FEDLOOM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data absent: set FEDLOOM_DATA (looked in {folder})")
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Return where a law is tried: on the CPU always, and on CUDA where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the test of an extra that is not installed, unless FEDLOOM_EXTRAS says that all of them are."""
    for mark in item.iter_markers("extra"):
        if (packages := absent(*mark.args)) and not os.environ.get("FEDLOOM_EXTRAS"):
            pytest.skip(f"needs the extra {mark.args[0]}: {', '.join(packages)} not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that no worker is left with one at the end; order in files stays."""
    items.sort(key=lambda item: "slow" not in item.keywords)
