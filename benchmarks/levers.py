"""Time one step of local training with each lever and without it, on three shapes.

    FEDLOOM_DATA=../shared/data python benchmarks/levers.py
    FEDLOOM_DATA=../shared/data python benchmarks/levers.py --shapes gpt2 --levers chunk gelu --batch-size 4 --pairs 7

A lever is something that makes a step cheaper and changes its result by rounding at most. Per pair one client takes the
same step on the same Dolly rows from the same start, once with the lever and once without, in alternating order, in one
process. Printed are the median and the range of (CPU time without / CPU time with), and the largest difference of the
losses. Everything else is as it ships. Levers that ship:

* ``chunk``: the loss goes through at least 192 targets at a time, instead of as many as 2^20 logits hold;
* ``targets``: the last block computes the targets' rows alone.

Levers that were tried and do not ship, switched on here from outside:

* ``malloc``: glibc keeps freed memory instead of giving it back to the system (Linux);
* ``gelu``: GPT-2's spelled-out GELU becomes torch's;
* ``norm``: RMS norms keep less for their backward.
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
from shapes import SHAPES, cpu_seconds, load_clients, load_shape
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from fedloom.data.tokens import TokenSet
from fedloom.lora.initial import fresh_adapter
from fedloom.lora.layer import LoRAModel
from fedloom.models.families import resolve_targets
from fedloom.training import last_block, loss
from fedloom.training.cohort_round import ClientTask, LocalTraining, train_cohort

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
    for module in list(model.modules()):
        if isinstance(getattr(module, "act", None), NewGELUActivation | nn.GELU):
            module.act = nn.GELU(approximate="tanh") if on else NewGELUActivation()


class RMSNorm(torch.autograd.Function):
    """``y = w·x / sqrt(mean(x²) + ε)`` of a frozen weight; with r the inverse root, dx = r·g − r³·x·(g·x) / D."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        inverse_N1 = norm_N1.square_().div_(x_ND.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_ND, inverse_N1, weight_D)
        y_ND: Tensor = (x_ND * inverse_N1).mul_(weight_D)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, inverse_N1, weight_D = ctx.saved_tensors
        grad_ND = grads[0] * weight_D
        along_N1 = (grad_ND * x_ND).sum(-1, keepdim=True).mul_(inverse_N1.pow(3)).div_(-x_ND.shape[-1])
        return grad_ND.mul_(inverse_N1).addcmul_(x_ND, along_N1), None, None


def norm(model: Any, on: bool) -> None:
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__dict__.pop("forward", None)
            if on:
                module.forward = lambda x, own=module: RMSNorm.apply(x, own.weight, own.variance_epsilon)


LEVERS: dict[str, Switch] = {f.__name__: f for f in (chunk, targets, malloc, gelu, norm)}
SHIPPED = ("chunk", "targets")
ABSENT = {("stories3M", "gelu"), ("llama", "gelu"), ("gpt2", "norm")}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--levers", nargs="+", choices=sorted(LEVERS), default=list(LEVERS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["FEDLOOM_DATA"])
    for shape in arguments.shapes:
        model, tokenizer = load_shape(shape, data)
        rows = load_clients(data, tokenizer, num_clients=1)[0]
        lora = LoRAModel(model, resolve_targets(model))
        for lever in arguments.levers:
            if (shape, lever) not in ABSENT:
                compare(shape, lever, lora, rows, arguments)


if __name__ == "__main__":
    main()
