"""Time steps, or scoring, with one thread, with two that share the rows, and with two in every operation.

    FEDLOOM_DATA=../shared/data python benchmarks/cores.py --shapes stories3M --pairs 5
    FEDLOOM_DATA=../shared/data python benchmarks/cores.py --work score --pairs 5
    FEDLOOM_DATA=../shared/data python benchmarks/cores.py --work split --batch-size 4 --pairs 5

The same work on the same Dolly rows, in turn, in one process: ``engine.cores = 1``; ``= 2``, one thread of arithmetic
each; and one pass whose operations torch divides between two threads (``engine.threads = 2``). ``train`` is a client's
step from the same start, ``score`` the losses of the first 60 rows, ``split`` a joint step of three clients and a
server that are cut at a quarter of the blocks. Printed are medians and ranges of the ratios of wall time to that of one
thread, and of CPU time. A machine that other work keeps busy lends two threads less than two cores, so wall
time says too little there; CPU time says what the threads cost each other. What one and two cores give is compared bit
by bit.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from shapes import SHAPES, cut_parties, load_clients, load_shape

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.models.cut import num_blocks
from fedloom.models.families import resolve_targets
from fedloom.models.fused import fuse_operators
from fedloom.split.parties import SplitParties
from fedloom.split.period import Period
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.row_losses import row_losses_of

WAYS = {"one": (1, 1), "cores": (2, 1), "threads": (1, 2)}
"""By way: cores that share the work, and threads inside an operation."""
RANK, SCORED, BUDGET, CUT_CLIENTS = 8, 60, 8192, 3


def step(lora: LoRAModel, rows: TokenSet, batch_size: int, cores: int, round: int) -> list[bytes]:
    """Train one step; return what it gives."""
    training = LocalTraining(learning_rate=3e-4, batch_size=batch_size, steps=1, max_grad_norm=1.0, cores=cores)
    task = ClientTask(0, rows, RANK, 2.0, fresh_adapter(lora.shapes, RANK, 1, 1, 0))
    (result,) = train_cohort(lora, [task], training, seed=1, round=round)
    return bytes_of(result.adapter)


def bytes_of(adapter: Adapter) -> list[bytes]:
    """Return the bytes of all factors."""
    return [factor.numpy().tobytes() for pair in adapter.values() for factor in (pair.a_RI, pair.b_OR)]


def score(lora: LoRAModel, rows: TokenSet, cores: int, _: int) -> list[bytes]:
    """Score some rows; return their losses."""
    few = rows.select(np.arange(min(SCORED, len(rows))))
    return [row_losses_of(lora, Adapter(), few, token_budget=BUDGET, cores=cores).sum_nats.tobytes()]


def split(parties: dict[int, SplitParties], cores: int, round: int) -> list[bytes]:
    """Take one step of a cut model; return the adapters of the clients and the server."""
    period = Period(parties[cores], parties[cores].initial())
    period.step(round)
    updates = [update for _, own in parties[cores].clients.end(range(CUT_CLIENTS)) for update in own]
    return [
        part for one in (parties[cores].server.party.adapter(), *(u.adapter for u in updates)) for part in bytes_of(one)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--work", choices=("train", "score", "split"), default="train")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS][1:], default=["cores"])
    arguments = parser.parse_args()
    data = Path(os.environ["FEDLOOM_DATA"])
    for shape in arguments.shapes:
        model, tokenizer = load_shape(shape, data)
        fuse_operators(model)
        of_client = load_clients(data, tokenizer, num_clients=CUT_CLIENTS if arguments.work == "split" else 1)
        rows, lora = of_client[0], LoRAModel(model, resolve_targets(model))
        work: dict[str, Callable[[int, int], list[bytes]]] = {
            "train": partial(step, lora, rows, arguments.batch_size),
            "score": partial(score, lora, rows),
        }
        if arguments.work == "split":
            at = max(1, num_blocks(model) // 4)
            training = LocalTraining(learning_rate=3e-4, batch_size=arguments.batch_size, max_grad_norm=1.0)
            parties = {
                n: cut_parties(lora, of_client, at, replace(training, cores=n), rank=RANK) for n, _ in WAYS.values()
            }
            work["split"] = partial(split, parties)
        ways = {way: WAYS[way] for way in ("one", *arguments.ways)}
        spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        same = True
        for round in range(arguments.pairs + 1):
            given: dict[str, list[bytes]] = {}
            for way, (cores, threads) in ways.items():
                torch.set_num_threads(threads)
                wall, cpu = time.perf_counter(), time.process_time()
                given[way] = work[arguments.work](cores, round + 1)
                spent[way].append((time.perf_counter() - wall, time.process_time() - cpu))
            same &= "cores" not in ways or given["cores"] == given["one"]
        one = np.array(spent["one"][1:])
        for way in arguments.ways:
            ratios = one / np.array(spent[way][1:])
            told = [
                f"{clock} {np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})"
                for clock, r in zip(("wall", "CPU"), ratios.T, strict=True)
            ]
            print(f"{shape:10s} one / {way:8s} {', '.join(told)}, n = {len(one)}", flush=True)
        print(f"{shape:10s} one and two cores give {'the same bits' if same else 'other bits'}", flush=True)


if __name__ == "__main__":
    main()
