"""Time one step of local training with each lever and without it, on three shapes.

    FEDLOOM_DATA=../shared/data python benchmarks/levers.py
    FEDLOOM_DATA=../shared/data python benchmarks/levers.py --shapes gpt2 --levers tiles gelu --batch-size 4 --pairs 7

A lever is something that makes a step cheaper and changes its result by rounding at most. Per pair one client takes the
same step on the same Dolly rows from the same start, once with the lever and once without, in alternating order, in one
process. Printed are the median and the range of (CPU time without / CPU time with), and the largest difference of the
losses. Everything else is as it ships. Levers that ship:

* ``tiles``: the loss goes through 2,048 tokens of the vocabulary at a time, for up to 384 targets in chunks of one
  size, instead of through all of it for 192 targets (fewer if they have more than 2^24 logits) and a rest;
* ``targets``: the last block computes the targets' rows alone;
* ``gelu``, ``norm``, ``rope``: GPT-2's GELU, RMS norms and the rotation in fewer passes than families spell out;
* ``wide``, with ``--dtype bfloat16`` or ``float16``: products are taken in fp32, as they ship on a CPU that has no
  units for 16 bits, instead of by torch's own operators for them.

``--heads 50257x768 262144x640 --targets 200`` times the loss of so many targets alone, of a random head, with ``tiles``
and without. ``--clients 1 10`` times instead the optimisers' steps of so many clients after a pass: torch's AdamW and
clipping for each against calls that all clients share, as they ship. It also counts the calls into torch that a step
makes where norms are taken as on a GPU. That is a proxy: a GPU starts at least one kernel for each.

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
from fedloom.lora import products
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.models import fused
from fedloom.models.families import resolve_targets
from fedloom.models.fused import fuse_operators
from fedloom.training import last_block, loss, verified_head
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort
from fedloom.training.optimiser import AdamWSettings, ClientOptimiser, step_together
from fedloom.training.output_head import OutputHead
from fedloom.training.slot_factors import factor_names

RANK, SCALE, SEED = 8, 2.0, 1
Switch = Callable[[Any, bool], None]


TILES, CHUNKS = loss.tile_of, loss._chunks


def tiles(_: Any, on: bool) -> None:
    loss.tile_of, loss._chunks = (TILES, CHUNKS) if on else (whole_rows, with_a_rest)


def whole_rows(_: str, vocabulary: int) -> loss.Tile:
    return loss.Tile(max(16, min(192, (1 << 24) // vocabulary)), vocabulary)


def with_a_rest(num_targets: int, tile: loss.Tile) -> list[slice]:
    return [slice(first, first + tile.rows) for first in range(0, num_targets, tile.rows)]


def targets(model: Any, on: bool) -> None:
    if on:
        verified_head._VERIFIED.pop(model, None)  # the next step tries the last block again
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


def wide(model: Any, on: bool) -> None:
    products.has_units = fused.has_units = lambda _: not on
    fuse_operators(model)


LEVERS: dict[str, Switch] = {f.__name__: f for f in (tiles, targets, malloc, gelu, norm, rope, wide)}
SHIPPED = ("tiles", "targets", "gelu", "norm", "rope", "wide")
ABSENT = {("stories3M", "gelu"), ("llama", "gelu"), ("gpt2", "norm"), ("gpt2", "rope")}
"""Levers that change nothing on a shape."""


def compare(shape: str, lever: str, lora: LoRAModel, rows: TokenSet, arguments: argparse.Namespace) -> None:
    """Run pairs of steps and print the ratios."""
    settings = LocalTraining(learning_rate=3e-4, batch_size=arguments.batch_size, steps=1, max_grad_norm=1.0)
    losses: dict[bool, float] = {}

    def step(on: bool, round: int) -> float:
        LEVERS[lever](lora.model, on)
        verified_head.output_head(lora.model)
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


def time_head(vocabulary: int, width: int, num_targets: int, pairs: int) -> None:
    """Print what loss and gradient of some targets take with a random head, through tiles and as it was before."""
    generator = torch.Generator().manual_seed(SEED)
    head = OutputHead(0.02 * torch.randn(vocabulary, width, generator=generator))
    hidden_SD = torch.randn(num_targets, width, generator=generator).requires_grad_()
    targets_S = torch.randint(vocabulary, (num_targets,), generator=generator)
    weights_S = torch.full((num_targets,), 1.0 / num_targets)

    def seconds(on: bool) -> float:
        tiles(None, on)
        return cpu_seconds(lambda: loss.supervised_cross_entropy(hidden_SD, head, targets_S, weights_S))

    seconds(True), seconds(False)  # warms up
    found = np.array([[seconds(on) for on in (False, True)] for _ in range(pairs)])
    tiles(None, True)
    ratios, (before, after) = found[:, 0] / found[:, 1], 1e3 * np.median(found, axis=0)
    spread = f"{ratios.min():.2f} to {ratios.max():.2f}, n = {pairs}"
    print(
        f"head {vocabulary} x {width}, {num_targets} targets: {before:.0f} ms in whole rows, {after:.0f} ms in tiles, "
        f"ratio {np.median(ratios):.2f} ({spread})",
        flush=True,
    )


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
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clients", nargs="+", type=int, help="time the optimisers of so many clients instead")
    parser.add_argument("--heads", nargs="+", metavar="VxD", help="time the loss of such heads alone instead")
    parser.add_argument("--targets", nargs="+", type=int, default=[200])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for sizes in arguments.heads or ():
        vocabulary, width = map(int, sizes.split("x"))
        for num_targets in arguments.targets:
            time_head(vocabulary, width, num_targets, arguments.pairs)
    if arguments.heads:
        return
    data = Path(os.environ["FEDLOOM_DATA"])
    for shape in arguments.shapes:
        model, tokenizer = load_shape(shape, data, arguments.dtype)
        fuse_operators(model)
        lora = LoRAModel(model, resolve_targets(model))
        if arguments.clients:
            for num_clients in arguments.clients:
                time_optimisers(shape, lora, num_clients, arguments.pairs)
            continue
        rows = load_clients(data, tokenizer, num_clients=1)[0]
        for lever in arguments.levers:
            if (shape, lever) not in ABSENT and (lever != "wide" or arguments.dtype != "float32"):
                compare(shape, lever, lora, rows, arguments)


if __name__ == "__main__":
    main()
