"""Time a client's steps with one thread, with two that share its rows, and with two inside every operation.

    FEDLOOM_DATA=../shared/data python benchmarks/cores.py --shapes stories3M --pairs 5

The same step on the same Dolly rows from the same start, in turn, in one process: ``engine.cores = 1``; ``= 2``, one
thread of arithmetic each; and one pass whose operations torch divides between two threads (``engine.threads = 2``).
Printed are medians and ranges of the ratios of wall time to that of one thread, and of CPU time. A machine that other
work keeps busy lends two threads less than two cores, so wall time says too little there; CPU time says what the
threads cost each other. The adapters of one and of two cores are compared bit by bit.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from shapes import SHAPES, load_clients, load_shape

from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.models.families import resolve_targets
from fedloom.models.fused import fuse_operators
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort

WAYS = {"one": (1, 1), "cores": (2, 1), "threads": (1, 2)}
"""By way: cores that share a step, and threads inside an operation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS][1:], default=["cores"])
    arguments = parser.parse_args()
    data = Path(os.environ["FEDLOOM_DATA"])
    for shape in arguments.shapes:
        model, tokenizer = load_shape(shape, data)
        fuse_operators(model)
        rows = load_clients(data, tokenizer, num_clients=1)[0]
        lora = LoRAModel(model, resolve_targets(model))
        training = LocalTraining(learning_rate=3e-4, batch_size=arguments.batch_size, steps=1, max_grad_norm=1.0)
        task = ClientTask(0, rows, 8, 2.0, fresh_adapter(lora.shapes, 8, 1, 1, 0))
        ways = {way: WAYS[way] for way in ("one", *arguments.ways)}
        spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        same = True
        for round in range(arguments.pairs + 1):
            adapters = {}
            for way, (cores, threads) in ways.items():
                torch.set_num_threads(threads)
                wall, cpu = time.perf_counter(), time.process_time()
                (result,) = train_cohort(lora, [task], replace(training, cores=cores), seed=1, round=round + 1)
                spent[way].append((time.perf_counter() - wall, time.process_time() - cpu))
                adapters[way] = result.adapter
            same &= "cores" not in ways or all(
                torch.equal(pair.a_RI, adapters["cores"][name].a_RI)
                and torch.equal(pair.b_OR, adapters["cores"][name].b_OR)
                for name, pair in adapters["one"].items()
            )
        one = np.array(spent["one"][1:])
        for way in arguments.ways:
            ratios = one / np.array(spent[way][1:])
            told = [
                f"{clock} {np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})"
                for clock, r in zip(("wall", "CPU"), ratios.T, strict=True)
            ]
            print(f"{shape:10s} one / {way:8s} {', '.join(told)}, n = {len(one)}", flush=True)
        print(f"{shape:10s} adapters of one and two cores: {'the same bits' if same else 'other bits'}", flush=True)


if __name__ == "__main__":
    main()
