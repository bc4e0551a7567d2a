"""Time a round of clients over Dolly against the same work with peft: in loops and in TRL's trainer.

    FEDLOOM_DATA=../shared/data python benchmarks/round.py
    FEDLOOM_DATA=../shared/data python benchmarks/round.py --batch-size 8 --steps 1 --repeats 7 --threads 1
    FEDLOOM_DATA=../shared/data python benchmarks/round.py --shape gpt2 --ranks 8 --batch-size 8 --steps 1 --threads 1

All sides train the same adapters (q and v, ranks 64 to 4, alpha = 2r) from the same start on the same batches of real
rows (at most 512 tokens, loss on the answer), with AdamW and clipping, in fp32 and in bf16. ``baselines.py`` says what
the others are; TRL's two train only where they are named (``--against``).

``--even 128`` takes the first 128 tokens of rows that have so many, every token learned: nothing is left to save.

The sides run in turn in one process; reported are medians, and the median of the paired ratios, in wall time and in
CPU time. Peak memory is what a process of its own per side needs beyond base, rows and libraries (Linux).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import SCALE, SEED, Clock, Side, Work, run_parts, run_peft, run_trl, run_trl_packed, start_of
from shapes import SHAPES, as_shipped, cpu_seconds, load_clients, load_shape

from fedloom.data.batches import batches
from fedloom.data.tokens import TokenSet
from fedloom.lora.layer import LoRAModel
from fedloom.models.families import resolve_targets
from fedloom.seeding import stream
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
CLOCKS = ("seconds", "cpu_seconds")


def run_fedloom(model: Any, work: Work) -> Side:
    lora = LoRAModel(model, resolve_targets(model))
    clock = Clock()
    tasks = [
        ClientTask(k, rows, rank, SCALE, start_of(lora.shapes, rank, k))
        for k, (rows, rank) in enumerate(zip(work.rows, work.ranks, strict=True))
    ]
    with as_shipped(model):
        results = train_cohort(lora, tasks, work.training, seed=SEED, round=1)
    side = clock.side([result.stats.loss_nats for result in results])
    lora.unwrap()
    return side


SIDES: dict[str, Callable[[Any, Work], Side]] = {
    "fedloom": run_fedloom,
    "peft": run_peft,
    "parts": run_parts,
    "trl": run_trl,
    "trl-packed": run_trl_packed,
}


def peak_memory_mib(side: str, dtype: str, arguments: argparse.Namespace) -> float:
    """Run one side once in its own process; return the most memory it needed beyond what was resident before."""
    command = [sys.executable, __file__, "--only", side, "--dtypes", dtype, "--repeats", "1"]
    command += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
    command += ["--shape", arguments.shape, "--ranks", *map(str, arguments.ranks)]
    command += ["--threads", str(arguments.threads), "--budget", str(arguments.budget)]
    command += [] if arguments.even is None else ["--even", str(arguments.even)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def rows_of(data: Path, tokenizer: Any, arguments: argparse.Namespace) -> list[TokenSet]:
    """Return each client's rows; with ``--even`` their first tokens, as many of each row, all of them learned."""
    clients = load_clients(data, tokenizer, len(arguments.ranks))
    if arguments.even is None:
        return clients
    cut = []
    for rows in clients:
        long = [rows.row(int(i))[0][: arguments.even] for i in np.flatnonzero(rows.lengths >= arguments.even)]
        cut.append(TokenSet.from_rows((ids.tolist(), [True] * arguments.even) for ids in long))
    return cut


def work_of(rows: list[TokenSet], arguments: argparse.Namespace) -> Work:
    training = LocalTraining(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=3e-4,
        max_grad_norm=1.0,
        token_budget=arguments.budget,
    )
    return Work(rows, arguments.ranks, training)


def num_tokens(work: Work) -> tuple[int, int]:
    """Return real tokens of the round, and tokens as padded to each batch's longest row."""
    real = padded = 0
    for client, rows in enumerate(work.rows):
        rng = stream(SEED, "batches", 1, client)
        for indices in batches(len(rows), work.training.batch_size, rng, steps=work.training.steps):
            lengths = rows.lengths[indices]
            real, padded = real + int(lengths.sum()), padded + len(lengths) * int(lengths.max())
    return real, padded


def floor_flops(model: Any, work: Work) -> float:
    """Return the operations that no way of training these batches saves: 4·N·T and 4·V·d in front of each label.

    Forward and the gradient at the activations of N weights of the blocks, on T real tokens; attention and adapters are
    left out, the last block is counted whole.
    """
    head = model.get_output_embeddings().weight
    others = {id(head), id(model.get_input_embeddings().weight)}
    names = ("wpe.", "embed")
    body = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and id(weight) not in others and not any(part in name for part in names)
    )
    tokens, targets = 0, 0
    for client, rows in enumerate(work.rows):
        rng = stream(SEED, "batches", 1, client)
        for indices in batches(len(rows), work.training.batch_size, rng, steps=work.training.steps):
            own = [rows.row(int(index)) for index in indices]
            tokens += sum(len(ids) for ids, _ in own)
            targets += sum(int(supervised[1:].sum()) for _, supervised in own)
    return 4.0 * body * tokens + 4.0 * head.numel() * targets


def matmul_rate(dtype: torch.dtype) -> float:
    """Return the operations per CPU second of a large matrix product."""
    x, weight = torch.ones(2048, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
    seconds = [cpu_seconds(lambda: x @ weight.T) for _ in range(9)]
    return 2.0 * x.shape[0] * weight.numel() / float(np.median(seconds))


def compare(data: Path, dtype: str, arguments: argparse.Namespace) -> None:
    """Run both sides in turn and print medians."""
    model, tokenizer = load_shape(arguments.shape, data, dtype)
    work = work_of(rows_of(data, tokenizer, arguments), arguments)
    real, padded = num_tokens(work)
    runs: dict[str, list[Side]] = {name: [] for name in ("fedloom", *arguments.against)}
    rates = []
    for repeat in range(arguments.repeats + 1):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            runs[name].append(SIDES[name](model, work))
        rates.append(matmul_rate(model.dtype))
    ours = runs["fedloom"][0].losses
    difference = max(abs(a - b) for name in runs for a, b in zip(ours, runs[name][0].losses, strict=True))
    print(
        f"{arguments.shape}, {dtype}: {real} real tokens, {padded} padded ({padded / real:.2f}x), losses within "
        f"{difference:.1e} nats"
    )
    for name, sides in runs.items():
        wall, cpu = (float(np.median([getattr(side, clock) for side in sides[1:]])) for clock in CLOCKS)
        print(f"  {name:12s} {wall:.2f} s, {cpu:.2f} CPU s, {real / wall:.0f} real tokens/s")
        if setup := float(np.median([side.setup_cpu_seconds for side in sides[1:]])):
            print(f"  {'':12s} {setup:.2f} CPU s more to make its trainers")
    floor, rate = floor_flops(model, work), float(np.median(rates[1:]))
    share = floor / rate / float(np.median([side.cpu_seconds for side in runs["fedloom"][1:]]))
    print(f"  floor {floor:.2e} operations, {rate / 1e9:.0f} GFLOP/s: the floor is {share:.0%} of fedloom's CPU time")
    for name in arguments.against:
        for clock in CLOCKS:
            pairs = zip(runs[name][1:], runs["fedloom"][1:], strict=True)
            ratios = np.array([getattr(theirs, clock) / getattr(ours, clock) for theirs, ours in pairs])
            spread = f"{ratios.min():.2f} to {ratios.max():.2f}, n = {len(ratios)}"
            print(f"  {name} / fedloom, {clock}: {np.median(ratios):.2f} ({spread})", flush=True)
    if not arguments.memory:
        return
    for name in runs:
        print(f"  {name:12s} peak {peak_memory_mib(name, dtype, arguments):.0f} MiB above base and rows", flush=True)


def run_one(data: Path, side: str, arguments: argparse.Namespace) -> None:
    """Run one side once and print the growth of this process's resident memory at its peak, in MiB."""
    model, tokenizer = load_shape(arguments.shape, data, arguments.dtypes[0])
    work = work_of(rows_of(data, tokenizer, arguments), arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
    before = _memory_mib("VmRSS")
    SIDES[side](model, work)
    print(_memory_mib("VmHWM") - before)


def _memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="stories3M")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="one client each, ten at most")
    others = [name for name in SIDES if name != "fedloom"]
    parser.add_argument("--against", nargs="*", choices=others, default=["peft", "parts"], help="the other sides")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks too")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=4, help="steps per client")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--even", type=int, metavar="TOKENS", help="rows of one length, every token learned")
    parser.add_argument("--budget", type=int, default=8192, help="tokens per pass (fedloom)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=sorted(SIDES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = Path(os.environ["FEDLOOM_DATA"])
    if arguments.only:
        run_one(data, arguments.only, arguments)
        return
    for dtype in arguments.dtypes:
        compare(data, dtype, arguments)


if __name__ == "__main__":
    main()
