"""Time one step of local training with each lever and without it, on three shapes.

    FEDLOOM_DATA=../shared/data python benchmarks/levers.py
    FEDLOOM_DATA=../shared/data python benchmarks/levers.py --shapes gpt2 --levers chunk gelu --batch-size 4 --pairs 7

A lever is something that makes a step cheaper and changes its result by rounding at most. Per pair one client takes the
same step on the same Dolly rows from the same start, once with the lever and once without, in alternating order, in one
process. Printed are the median and the range of (CPU time without / CPU time with), and the largest difference of the
losses. Everything else is as it ships. Levers that ship:

* ``chunk``: the loss goes through at least 192 targets at a time, instead of as many as 2^20 logits hold;
* ``targets``: the last block computes the targets' rows alone;
* ``gelu``, ``norm``, ``rope``: GPT-2's GELU, RMS norms and the rotation in fewer passes than families spell out.

``--clients 1 10`` times instead the optimisers' steps of so many clients after a pass: torch's AdamW and clipping for
each against calls that all clients share, as they ship. It also counts the calls into torch that a step makes where
norms are taken as on a GPU. That is a proxy: a GPU starts at least one kernel for each.

One that was tried and does not ship, switched on here from outside: ``malloc``, glibc keeps freed memory instead of
giving it back to the system (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, cpu_seconds, load_clients, load_shape, spell_out
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models.families import resolve_targets
from fedloom.models.fused import fuse_operators
from fedloom.training import last_block, loss
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.optimiser import AdamWSettings, ClientOptimiser, step_together
from fedloom.training.slot_factors import factor_names

RANK, SCALE, SEED = 8, 2.0, 1
Switch = Callable[[Any, bool], None]


def chunk(_: Any, on: bool) -> None:
    loss.CHUNK_ROWS = 192 if on else 0


def targets(model: Any, on: bool) -> None:
    if on:
        loss._VERIFIED.pop(model, None)  # the next step tries the last block again
    else:
        last_block._FOUND.pop(model, None)


def malloc(_: Any, on: bool) -> None:
    """Set what glibc otherwise comes to by itself (off), or let it keep all that was freed (on)."""
    top_pad, trim, most_maps, map_above = (64 << 20, (1 << 31) - 1, 0, 32 << 20) if on else OWN_WAY
    libc = ctypes.CDLL(None)
    for parameter, value in ((-2, top_pad), (-1, trim), (-4, most_maps), (-3, map_above)):
        if not libc.mallopt(parameter, value):
            raise SystemExit(f"malloc: expected glibc to take mallopt({parameter}, {value}), it refused; leave it out")


OWN_WAY = (128 << 10, 64 << 20, 65536, 32 << 20)
"""Where glibc's own adjustment ends once a block of 32 MB was freed."""


def gelu(model: Any, on: bool) -> None:
    as_its_family(model, on, "MLP")


def norm(model: Any, on: bool) -> None:
    as_its_family(model, on, "RMSNorm")


def rope(model: Any, on: bool) -> None:
    as_its_family(model, on, "Attention")


def as_its_family(model: Any, on: bool, kind: str) -> None:
    """Run the modules of a kind as they ship, or with the operators of their family."""
    if on:
        fuse_operators(model)
    else:
        spell_out(model, kind)


LEVERS: dict[str, Switch] = {f.__name__: f for f in (chunk, targets, malloc, gelu, norm, rope)}
SHIPPED = ("chunk", "targets", "gelu", "norm", "rope")
ABSENT = {("stories3M", "gelu"), ("llama", "gelu"), ("gpt2", "norm"), ("gpt2", "rope")}
"""Levers that change nothing on a shape."""


def compare(shape: str, lever: str, lora: LoRAModel, rows: TokenSet, arguments: argparse.Namespace) -> None:
    """Run pairs of steps and print the ratios."""
    settings = LocalTraining(learning_rate=3e-4, batch_size=arguments.batch_size, steps=1, max_grad_norm=1.0)
    losses: dict[bool, float] = {}

    def step(on: bool, round: int) -> float:
        LEVERS[lever](lora.model, on)
        loss.output_head(lora.model)
        task = ClientTask(0, rows, RANK, SCALE, fresh_adapter(lora.shapes, RANK, SEED, 1, 0))

        def work() -> None:
            losses[on] = train_cohort(lora, [task], settings, seed=SEED, round=round)[0].stats.loss_nats

        return cpu_seconds(work)

    ratios, difference = [], 0.0
    for pair in range(arguments.pairs + 1):
        order = (True, False) if pair % 2 else (False, True)
        seconds = {on: step(on, pair + 1) for on in order}
        difference = max(difference, abs(losses[True] - losses[False]))
        if pair:  # the first warms up
            ratios.append(seconds[False] / seconds[True])
    LEVERS[lever](lora.model, lever in SHIPPED)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)}"
    print(f"{shape:10s} {lever:8s} {np.median(ratios):.3f} ({spread}), losses within {difference:.0e}", flush=True)


def time_optimisers(shape: str, lora: LoRAModel, num_clients: int, pairs: int) -> None:
    """Print what a step of the clients' optimisers takes, each alone and all together."""
    lora.open([Slot(RANK, SCALE)] * num_clients)
    factors = [dict(zip(factor_names(lora), lora.parameters(k), strict=True)) for k in range(num_clients)]
    generator = torch.Generator().manual_seed(SEED)
    for factor in (factor for own in factors for factor in own.values()):
        factor.grad.normal_(0.0, 0.01, generator=generator)  # type: ignore[union-attr]
    shared = [ClientOptimiser(own, AdamWSettings(3e-4, max_grad_norm=1.0), lambda _: 1.0) for own in factors]
    alone = [torch.optim.AdamW(own.values(), 3e-4, weight_decay=0.0, fused=True) for own in factors]

    def apart(foreach: bool | None = None) -> None:  # torch takes norms one by one on a CPU, and in one call on a GPU
        for own, adamw in zip(factors, alone, strict=True):
            nn.utils.clip_grad_norm_(own.values(), 1.0, foreach=foreach)
            adamw.step()

    ways: list[Callable[[], object]] = [apart, lambda: step_together(shared)]
    for way in ways:
        way()
    seconds = np.array([[cpu_seconds(way) for way in ways] for _ in range(pairs)])
    apart_ms, together_ms = (1e3 * np.median(seconds, axis=0)).tolist()
    ratios = seconds[:, 0] / seconds[:, 1]
    before, after = num_calls(lambda: apart(foreach=True)), num_calls(ways[1])
    spread = f"{ratios.min():.2f} to {ratios.max():.2f}, n = {pairs}"
    took = f"{apart_ms:.2f} ms apart, {together_ms:.2f} ms together, ratio {np.median(ratios):.2f} ({spread})"
    print(f"{shape:10s} {num_clients} clients: {took}; {before} and {after} calls", flush=True)
    lora.close()


def num_calls(work: Callable[[], object]) -> int:
    """Return how many operators run that no other operator called, those left out that compute nothing."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    nothing = {
        f"aten::{name}" for name in ("to", "detach", "select", "unbind", "split_with_sizes")
    }  # views, and no move
    return sum(e.name.startswith("aten::") and not is_inside(e) and e.name not in nothing for e in seen.events())


def is_inside(event: Any) -> bool:
    """Tell whether an operator was called by another."""
    while (event := event.cpu_parent) is not None:
        if event.name.startswith("aten::"):
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--levers", nargs="+", choices=sorted(LEVERS), default=list(LEVERS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clients", nargs="+", type=int, help="time the optimisers of so many clients instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["FEDLOOM_DATA"])
    for shape in arguments.shapes:
        model, tokenizer = load_shape(shape, data)
        fuse_operators(model)
        lora = LoRAModel(model, resolve_targets(model))
        if arguments.clients:
            for num_clients in arguments.clients:
                time_optimisers(shape, lora, num_clients, arguments.pairs)
            continue
        rows = load_clients(data, tokenizer, num_clients=1)[0]
        for lever in arguments.levers:
            if (shape, lever) not in ABSENT:
                compare(shape, lever, lora, rows, arguments)


if __name__ == "__main__":
    main()
