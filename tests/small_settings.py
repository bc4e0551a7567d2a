"""A tiny base and a tiny data set on disk, and settings that run on them in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import seeded_model

from fedloom import config
from fedloom.config import Settings
from fedloom.methods.table import traits_of
from fedloom.seeding import stream

CATEGORIES = ("colours", "numbers", "animals")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Llama over bytes."""
    folder = tmp_path_factory.mktemp("base")
    seeded_model("llama", vocab_size=256).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 48 short rows in three categories."""
    rng, path = stream(1, "rows"), tmp_path_factory.mktemp("rows") / "rows.json"
    words = ["red", "blue", "one", "two", "cat", "dog"]
    rows = []
    for k in range(48):
        question = " ".join(rng.choice(words, size=2))
        rows.append(
            {"instruction": question, "context": "", "response": str(rng.choice(words)), "category": CATEGORIES[k % 3]}
        )
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def settings_for(base_folder: Path, rows_file: Path) -> Callable[..., Settings]:
    """Return a function that makes settings: three clients of different ranks, two rounds of two steps."""

    def make(**overrides: object) -> Settings:
        document: dict[str, dict[str, object]] = {
            "model": {"base": str(base_folder), "tokenizer": "bytes"},
            "data": {"path": str(rows_file), "shape": "dolly", "template": "plain", "eval_rows": 6},
            "partition": {"scheme": "category", "column": "category", "categories_per_client": 2},
            "method": {"name": "flora", "ranks": [4, 2, 1]},
            "federation": {"num_rounds": 2, "num_clients": 3},
            "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        }
        for name, value in overrides.items():
            table, key = name.split("__")
            document.setdefault(table, {})[key] = value
        if not traits_of(str(document["method"]["name"])).is_trained:
            del document["method"]["ranks"], document["federation"]["num_rounds"], document["training"]
        return config.resolve(document, "a test")

    return make
