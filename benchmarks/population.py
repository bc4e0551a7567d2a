"""A round with ten clients drawn from a population of 100 and of 100,000: server time and memory per round.

    python benchmarks/population.py [--rounds 20]

Clients take one tiny step on one row each, so that what is measured is drawing, handing out, taking in and saving the
state, which must not grow with the population. Rounds of both sizes alternate; prints medians and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.data.schemes import iid
from fedloom.data.tokens import TokenSet
from fedloom.engines.local_engine import LocalEngine
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
from fedloom.seeding import stream
from fedloom.training.cohort_round import LocalTraining

SIZES = (100, 100_000)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
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
