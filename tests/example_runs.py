"""Run folders as a comparison leaves them, with made-up figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.run_folder.contents import sha256
from fedloom.run_folder.durable import json_bytes
from fedloom.run_folder.manifest import read_manifest, write_manifest
from fedloom.run_folder.reader import Holding, holdings_document
from fedloom.run_folder.writer import RunFolder

METHODS = ("fedit", "zero-padding", "flora", "centralised", "standalone", "base")
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
CATEGORIES = ("brainstorming", "classification", "closed_qa", "creative_writing", "general_qa", "open_qa")
MODULES = tuple(f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(3) for part in "qv")

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run folder: ``make_run("flora", seed=1, num_rounds=5)``."""
    return lambda method, **options: write_example_run(tmp_path / "runs", method, **options)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a comparison of every method over two seeds; do not change it."""
    parent = tmp_path_factory.mktemp("comparison")
    for method in METHODS:
        for seed in (1, 2):
            write_example_run(parent, method, seed=seed)
    return parent


def write_example_run(
    parent: Path, method: str, seed: int = 1, num_rounds: int = 6, finish: str = "finished", **settings: Any
) -> Path:
    """Write one run; its losses fall towards a level of the method's own, with some noise of the seed's."""
    path = parent / f"{method}-seed{seed}"
    rng = np.random.default_rng([seed, METHODS.index(method)])
    config = {
        "model": {"base": "models/stories3M"},
        "data": {"path": "instruct/dolly15k", **settings},
        "method": {"name": method, "ranks": list(RANKS)},
        "federation": {"num_rounds": num_rounds, "num_clients": len(RANKS)},
        "run": {"seed": seed},
    }
    identity = {"seed": seed, "base_sha256": "a" * 64, "data_sha256": "b" * 64, "partition_sha256": "c" * 64}
    with RunFolder.open(path, config, identity) as folder:
        folder.write_json("holdings.json", holdings_document(example_holdings(), "category"))
        for n in range(1, (1 if method == "base" else num_rounds) + 1):
            folder.write_round(n, example_record(method, n, rng))
        if method != "base":
            folder.write_folder("adapter", lambda place: write_example_adapter(place, method, rng))
        if finish == "finished":
            folder.finish({"seconds": 60.0})
    return path


def rewrite(run: Path, name: str, value: Any) -> None:
    """Replace a file of a run as the run itself does: the manifest names its new hash."""
    manifest = read_manifest(run)
    data = json_bytes(value)
    manifest["files"][name] = [sha256(data)]
    (run / name).write_bytes(data)
    write_manifest(run, manifest)


def example_holdings() -> list[Holding]:
    rng = np.random.default_rng(0)
    holdings = []
    for client, rank in enumerate(RANKS):
        chosen = rng.choice(len(CATEGORIES), size=int(rng.integers(2, 4)), replace=False)
        groups = {CATEGORIES[index]: int(rng.integers(80, 700)) for index in sorted(chosen)}
        holdings.append(Holding(str(client), sum(groups.values()), rank, groups))
    return holdings


def example_record(method: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    level = {"fedit": 4.72, "zero-padding": 4.80, "flora": 4.66, "centralised": 4.6, "standalone": 4.95, "base": 5.32}
    start = 5.32 if method == "base" else 5.3
    loss = level[method] + (start - level[method]) * math.exp(-n / 2) + float(rng.normal(0, 0.012))
    federated = method in {"fedit", "zero-padding", "flora"}
    clients = [example_client(client, loss, federated, rng) for client in range(len(RANKS))]
    if n == 2 and method == "flora":
        clients[4] |= {"reason": "not finite", "loss_nats": None}
    return {
        "method": method,
        "clients": clients if method != "base" else [],
        "train_loss_nats": loss + 0.1,
        "eval": {
            "loss_nats": loss,
            "perplexity": math.exp(loss),
            "num_tokens": 1000,
            "suites": {"exact-match": {"metrics": {"exact_match": {"value": 0.6 - loss / 10}}}},
            "loss_nats_of_group": {name: loss * (0.5 + k / 6) for k, name in enumerate(CATEGORIES)},
        },
        "aggregation_noise": {"fedit": 0.4, "zero-padding": 0.7, "flora": 0.0}.get(method),
        "upload_bytes": 2_000_000 * federated,
        "download_bytes": (20_000_000 if method == "flora" else 2_000_000) * federated,
        "seconds": {"train": 8.0 + float(rng.uniform()), "aggregate": 0.3, "evaluate": 1.2},
        "peak_memory_bytes": 900_000_000,
        "rank": dict.fromkeys(MODULES, 160 * n if method == "flora" else 64),
    }


def example_client(client: int, loss: float, federated: bool, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "client": client,
        "reason": None,
        "num_rows": 300 + 40 * client,
        "num_tokens": 9000,
        "weight": 0.1,
        "loss_nats": loss + float(rng.normal(0, 0.15)),
        "norm": 1.0 + float(rng.uniform()),
        "seconds": 0.8 + float(rng.uniform()),
        "upload_bytes": 40_000 * RANKS[client] * federated,
        "download_bytes": 400_000 * federated,
    }


def write_example_adapter(folder: Path, method: str, rng: np.random.Generator) -> None:
    import torch

    from fedloom.lora.pair import Adapter, Pair
    from fedloom.lora.peft_files import save_peft

    rank = 24 if method == "flora" else 8
    decay = np.geomspace(1, 0.01, rank)
    pairs = {
        module: Pair(
            torch.tensor(rng.normal(size=(48, rank)) * decay, dtype=torch.float32),
            torch.tensor(rng.normal(size=(rank, 64)), dtype=torch.float32),
        )
        for module in MODULES
    }
    save_peft(Adapter(pairs), folder, base_name="stories3M")
