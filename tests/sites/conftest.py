"""Three sites with files of their own, and the recipe of one process that has the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_link import NAMES, Hub, SiteThread, site_of

from fedloom import config
from fedloom.config import Settings
from fedloom.seeding import stream


@pytest.fixture(scope="session")
def site_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file of rows per site, in the layout that a natural partition reads, and one held out."""
    folder, rng = tmp_path_factory.mktemp("sites"), stream(3, "site rows")
    words = ["red", "blue", "one", "two", "cat", "dog"]
    sizes = {
        "training/local_training_0": 20,
        "training/local_training_1": 12,
        "training/local_training_2": 16,
        "eval": 6,
    }
    (folder / "training").mkdir()
    for name, size in sizes.items():
        rows = [
            {"instruction": " ".join(rng.choice(words, size=2)), "context": "", "response": str(rng.choice(words))}
            for _ in range(size)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def recipe(base_folder: Path, site_rows: Path) -> Callable[..., Settings]:
    """Return a function that makes the settings of one process with the sites' rows."""

    def make(**overrides: Any) -> Settings:
        document: dict[str, dict[str, Any]] = {
            "model": {"base": str(base_folder), "tokenizer": "bytes"},
            "data": {
                "path": str(site_rows / "training"),
                "shape": "dolly",
                "template": "plain",
                "eval_path": str(site_rows / "eval.json"),
            },
            "partition": {"scheme": "natural"},
            "method": {"name": "flora", "ranks": [4, 2, 1]},
            "federation": {"num_rounds": 3, "num_clients": 3},
            "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "dropout": 0.1},
        }
        for name, value in overrides.items():
            table, key = name.split("__")
            document.setdefault(table, {})[key] = value
        return config.resolve(document, "a test")

    return make


@pytest.fixture
def sites(base_folder: Path, site_rows: Path, tmp_path: Path) -> Iterator[Callable[..., list[SiteThread]]]:
    """Return a function that starts the three sites in threads."""
    started: list[SiteThread] = []

    def start(hub: Hub, **policy: object) -> list[SiteThread]:
        for number, name in enumerate(NAMES):
            rows = site_rows / "training" / f"local_training_{number}.json"
            started.append(SiteThread(site_of(name, rows, tmp_path / "state", base_folder, **policy), hub))
        return started

    yield start
    for site in started:
        site.end()
