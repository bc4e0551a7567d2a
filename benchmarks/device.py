"""Time a round of clients on an accelerator: together, one by one, with peft, and in the best loop from parts.

    FEDLOOM_DATA=../shared/data python benchmarks/device.py
    FEDLOOM_DATA=../shared/data python benchmarks/device.py --shapes llama7b --sides together --steps 2 --profile

The rows, starts and baselines are those of ``baselines.py``; every side trains the same adapters (q and v, or GPT-2's
c_attn) on the same batches, and the losses must agree. ``llama7b`` has the sizes of Llama-2-7B with random weights
(13.5 GB in bf16; GPT-2's 40,000 tokens of text stand for its own).

* ``together``: one cohort, several clients' rows in one pass;
* ``alone``: the same code, one client after another;
* ``peft``, ``parts``: as in ``baselines.py``.

The sides run in turn; reported are medians of the wall time with the device's queue empty at both ends, paired ratios,
the share of the matrix ceiling (the floor of ``round.py`` at the rate of a large product of the same type, over the
time) and the device's peak memory beyond the base.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import SCALE, SEED, Work, run_parts, run_peft, start_of
from round import floor_flops, num_tokens, work_of
from shapes import as_shipped, load_clients, load_shape
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.data.tokenizer import load_tokenizer
from fedloom.lora.layer import LoRAModel
from fedloom.models.families import resolve_targets
from fedloom.training.cohort_round import ClientTask, train_cohort

MOST_ROWS = 300
"""Rows of a client that are read: more than its steps take."""


def load(shape: str, data: Path, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Return a shape's frozen model on the device and its tokenizer."""
    if shape != "llama7b":
        model, tokenizer = load_shape(shape, data, str(dtype).removeprefix("torch."))
        return model.to(device), tokenizer
    config = LlamaConfig(dtype=dtype)  # its defaults are the sizes of Llama-2-7B
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.02) if weight.dim() > 1 else weight.data.fill_(1.0)
    rotary = model.model.rotary_emb
    rotary.inv_freq = type(rotary)(config, device).inv_freq
    return model.requires_grad_(False).eval(), load_tokenizer(data / "tokenizers" / "llama")


def cohorts(size: int | None) -> Callable[[Any, Work], list[float]]:
    """Return a side that trains cohorts of a size, or all clients together."""

    def run(model: Any, work: Work) -> list[float]:
        lora = LoRAModel(model, resolve_targets(model))
        tasks = [
            ClientTask(k, rows, rank, SCALE, start_of(lora.shapes, rank, k))
            for k, (rows, rank) in enumerate(zip(work.rows, work.ranks, strict=True))
        ]
        step = size or len(tasks)
        parts = [tasks[first : first + step] for first in range(0, len(tasks), step)]
        with as_shipped(model):
            results = [r for part in parts for r in train_cohort(lora, part, work.training, seed=SEED, round=1)]
        lora.unwrap()
        return [result.stats.loss_nats for result in results]

    return run


SIDES: dict[str, Callable[[Any, Work], list[float]]] = {
    "together": cohorts(None),
    "alone": cohorts(1),
    "peft": lambda model, work: run_peft(model, work).losses,
    "parts": lambda model, work: run_parts(model, work).losses,
}


def timed(device: str, work: Callable[[], object]) -> float:
    """Return the wall time of a call, with the device's queue empty before and after."""
    synchronise(device)
    begun = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begun


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Return the operations per second of a large matrix product."""
    size = 512 if device == "cpu" else 8192
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / float(np.median([timed(device, lambda: x @ weight) for _ in range(9)][2:]))


def measure(shape: str, dtype: torch.dtype, data: Path, arguments: argparse.Namespace) -> None:
    """Run the sides in turn and print what they took."""
    device = arguments.device
    model, tokenizer = load(shape, data, dtype, device)
    work = work_of(load_clients(data, tokenizer, len(arguments.ranks), MOST_ROWS), arguments)
    work = replace(work, training=replace(work.training, checkpoint_activations=arguments.checkpoint))
    real, padded = num_tokens(work)
    seconds: dict[str, list[float]] = {side: [] for side in arguments.sides}
    losses: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for _ in range(arguments.repeats + 1):
        for side in arguments.sides:
            held = 0
            if device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            seconds[side].append(timed(device, lambda: losses.update({side: SIDES[side](model, work)})))  # noqa: B023
            print(f"  ... {side} {seconds[side][-1]:.2f} s", flush=True)
            peaks[side] = (torch.cuda.max_memory_allocated() - held) / 2**30 if device != "cpu" else 0.0
    rate, floor = matmul_rate(dtype, device), floor_flops(model, work)
    first = losses[arguments.sides[0]]
    apart = max(abs(a - b) for found in losses.values() for a, b in zip(first, found, strict=True))
    print(f"{shape}, {dtype}, {device}: {len(work.ranks)} clients, {real} real tokens, {padded} padded")
    print(f"  losses within {apart:.1e} nats; products at {rate / 1e12:.1f} TFLOP/s")
    for side, took in seconds.items():
        middle = float(np.median(took[1:]))
        share, tokens = floor / rate / middle, real / middle
        print(f"  {side:9s} {middle:.3f} s, {tokens:.0f} tokens/s, {share:.0%} of the ceiling, {peaks[side]:.2f} GiB")
    for side, took in seconds.items():
        ratios = np.array(took[1:]) / np.array(seconds[arguments.sides[0]][1:])
        spread = f"{ratios.min():.2f} to {ratios.max():.2f}, n = {len(ratios)}"
        print(f"  {side} / {arguments.sides[0]}: {np.median(ratios):.2f} ({spread})", flush=True)
    if arguments.profile:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            SIDES[arguments.sides[0]](model, work)
            synchronise(device)
        order = "self_cpu_time_total" if device == "cpu" else "self_cuda_time_total"
        for by in {order, "self_cpu_time_total"}:
            print(seen.key_averages().table(sort_by=by, row_limit=18, max_name_column_width=48), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gpt2"], help="stories3M, llama, gpt2, llama7b")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16] * 10, help="one client each, ten at most")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--steps", type=int, default=8, help="steps per client")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per step")
    parser.add_argument("--budget", type=int, default=16384, help="tokens per pass (fedloom)")
    parser.add_argument("--checkpoint", action="store_true", help="training.checkpoint_activations (fedloom)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="a table of operators of the first side")
    arguments = parser.parse_args()
    data = Path(os.environ["FEDLOOM_DATA"])
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            measure(shape, getattr(torch, dtype), data, arguments)


if __name__ == "__main__":
    main()
