"""A round with ten clients drawn from a population of 100 and of 100,000: server time and memory per round.

    python benchmarks/population.py [--rounds 20]

Clients take one tiny step on one row each, so that what is measured is drawing, handing out, taking in and saving the
state, which must not grow with the population. Rounds of both sizes alternate; prints medians and the ratio.

    python benchmarks/population.py --engine ray --rounds 6

Whole runs in place of bare rounds, of 1,000 and of 100,000 clients, 100 a round, on two workers of Ray or in one
process: what the driver holds must not grow with the rounds, nor much with the population.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom import config
from fedloom.data.schemes import iid
from fedloom.data.tokens import TokenSet
from fedloom.engines.local_engine import LocalEngine
from fedloom.experiment.session import run
from fedloom.federation.rounds import RoundPlan, RoundRecord, run_rounds
from fedloom.federation.sampling import sample_clients
from fedloom.federation.server import ServerRules
from fedloom.federation.update_checks import Asked
from fedloom.lora.layer import LoRAModel
from fedloom.methods.flora import FLoRA
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.state_codec import state_files
from fedloom.methods.strategy import Cohort
from fedloom.models.families import resolve_targets
from fedloom.reporting.peak_memory import peak_memory_bytes
from fedloom.reporting.progress import SilentProgress
from fedloom.seeding import stream
from fedloom.training.cohort_round import LocalTraining

SIZES = (100, 100_000)
WHOLE_SIZES, PER_ROUND = (1_000, 100_000), 100


def rounds_of(lora: LoRAModel, num_clients: int, num_rounds: int):  # type: ignore[no-untyped-def]
    """Return the round loop over a population of one row per client."""
    rng = stream(1, "tokens")
    ids = rng.integers(1, 64, size=8 * num_clients, dtype=np.int32)
    tokens = TokenSet(ids, np.ones(len(ids), dtype=bool), np.arange(num_clients + 1, dtype=np.int64) * 8)
    partition = iid(num_clients, num_clients, seed=1)
    ranks = dict.fromkeys(range(num_clients), 4)
    plan = RoundPlan(
        num_rounds=num_rounds,
        strategy=FLoRA(Cohort(lora.shapes, 4, ranks.__getitem__, seed=1)),
        rules=ServerRules(PlainStep()),
        sample=lambda round: sample_clients(1, round, num_clients, 10),
        shapes=lora.shapes,
        ranks=ranks,
        scales=dict.fromkeys(ranks, 2.0),
        asked=lambda client: Asked(1, 1, 8),
        evaluate_every=0,
    )
    training = LocalTraining(learning_rate=1e-3, batch_size=1, steps=1)
    engine = LocalEngine(lora, lambda client: tokens.select(partition.rows_of(client)), training, seed=1)
    return run_rounds(plan.strategy.initial(), plan, engine, lambda state: {})


class Watch(SilentProgress):
    """Notes when each round was done, and what the process held then."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.megabytes: list[float] = []

    def round_done(self, record: Mapping[str, Any]) -> None:
        """Note both; a client that was left out would make the figures wrong."""
        assert all(client["reason"] is None for client in record["clients"]), record["clients"]
        self.moments.append(time.perf_counter())
        self.megabytes.append(psutil.Process().memory_info().rss / 1e6)


def run_whole(folder: Path, num_clients: int, num_rounds: int, engine: str) -> None:
    """Run a recipe into a folder as a person would, and print seconds a round and the memory of this process."""
    rows = [{"instruction": f"say {number}", "context": "", "response": "yes"} for number in range(num_clients)]
    (folder / "rows.json").write_text(json.dumps(rows))
    document = {
        "model": {"base": str(folder / "base"), "tokenizer": "bytes"},
        "data": {"path": str(folder / "rows.json"), "shape": "dolly", "template": "plain"},
        "partition": {"scheme": "iid"},
        "method": {"name": "flora", "ranks": 4},
        "federation": {"num_rounds": num_rounds, "num_clients": num_clients, "clients_per_round": PER_ROUND},
        "training": {"local_steps": 1, "batch_size": 1, "learning_rate": 1e-3},
        "evaluation": {"every": 0},
        "engine": {"name": engine, **({"workers": 2} if engine == "ray" else {})},
    }
    watch = Watch()
    run(config.resolve(document, "the benchmark"), folder / f"run-{num_clients}", progress=watch)
    seconds = [b - a for a, b in pairwise(watch.moments)]
    held = watch.megabytes
    print(
        f"{num_clients:>7,} clients, {PER_ROUND} a round on {engine}: {statistics.median(seconds):.2f} s a round; this "
        f"process held {held[0]:.0f} MB after the first round, {held[len(held) // 2]:.0f} in the middle, "
        f"{held[-1]:.0f} after the last",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--engine", choices=["local", "ray"], help="run whole recipes, and watch the driver's memory")
    options = parser.parse_args()
    vocabulary = 64 if options.engine is None else 256
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(shape)
    if options.engine is not None:
        with tempfile.TemporaryDirectory(prefix="population-") as name:
            model.save_pretrained(Path(name) / "base")
            for size in WHOLE_SIZES:
                run_whole(Path(name), size, options.rounds, options.engine)
        return
    lora = LoRAModel(model, resolve_targets(model, None))
    loops = {size: rounds_of(lora, size, options.rounds) for size in SIZES}
    spent: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(options.rounds):
        for size, loop in loops.items():
            begun = time.perf_counter()
            record: RoundRecord = next(loop)
            state_files(record.state)
            spent[size].append(time.perf_counter() - begun)
    ratio = statistics.median(b / a for a, b in zip(*(spent[size][1:] for size in SIZES), strict=True))
    for size in SIZES:
        print(f"{size:>7,} clients, 10 a round: {1e3 * statistics.median(spent[size][1:]):7.1f} ms a round")
    print(f"ratio {ratio:.2f}; peak memory of the process {peak_memory_bytes() / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
