"""Account for the whole CPU time of a training step, part by part, against the floor of ``round.py``.

    FEDLOOM_DATA=../shared/data python benchmarks/accounting.py
    FEDLOOM_DATA=../shared/data python benchmarks/accounting.py --shapes gpt2 --batch-size 4 --steps 1 --repeats 5

One client of rank 8 trains on real rows, one thread, fp32. Every operator's own CPU time is taken, which other work on
the machine disturbs little. A backward operator belongs to the part of the forward operator that it differentiates
(they share a sequence number). The operations of matrix products, at the rate of a large product measured in turn, are
set apart from what products take beyond that. What no operator takes, of a step that nobody watches, is Python,
autograd's own work and the calls between, so the parts add up to the step.

Printed per part: its share of a step, the mean over the repeats and their range, and the three largest above the floor.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from round import floor_flops, matmul_rate, run_fedloom, work_of
from shapes import SHAPES, cpu_seconds, load_clients, load_shape
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.training import client_passes

AT_RATE, BEYOND, CALLS = "products at the measured rate", "products beyond it", "Python, autograd, calls"
LOSS = "loss beside its products"
MOST_ROWS = 300
OPTIMISER = ("_fused_adamw", "linalg_vector_norm", "_foreach")


def part_of_module(module: nn.Module) -> str | None:
    """Return the part of a step that a module's operators, other than products and attention, are counted under."""
    kind = type(module).__name__
    if "Norm" in kind:
        return "norms"
    if "Rotary" in kind:
        return "rotation"
    if kind.endswith("Attention"):
        return "around attention: rotation, heads, copies"
    if kind.endswith("MLP"):
        return "activation and gate"
    return "adapters" if kind == "LoRALinear" else None


def num_operations(name: str, args: Sequence[Any]) -> float:
    """Return the operations of a matrix product, none of anything else."""
    shapes = [one.shape for one in args if isinstance(one, torch.Tensor)]
    if name not in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
        return 0.0
    left, right = shapes[-2:]
    return 2.0 * math.prod(left) * right[-1]


class Watch(TorchDispatchMode):
    """Adds up the CPU seconds of operators by the part of the step that they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.operations = 0.0
        self.open_parts = ["others"]
        self._differentiated: dict[int, str] = {}

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.open_parts.append(part_of_module(module) or "others")

    def leave(self, *_: Any) -> None:
        self.open_parts.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.thread_time()
        result = func(*args, **(kwargs or {}))
        took, name = time.thread_time() - begun, func.overloadpacket.__name__
        node = torch._C._current_autograd_node()
        if node is None:
            part = self.open_parts[-1]
            # The graph's node of an operator is there before it runs; what has none comes later under its number.
            self._differentiated.setdefault(torch._C._autograd._get_sequence_nr() - 1, part)
        else:
            part = self._differentiated.get(node._sequence_nr(), "others")
        operations = num_operations(name, args)
        self.operations += operations
        if operations:
            part = "products"
        elif "attention" in name:
            part = "attention's kernel"
        elif part == "others" and any(known in name for known in OPTIMISER):
            part = "optimiser"
        self.seconds[part] += took
        return result


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Watch what runs, and which part of the model it belongs to."""
    with ExitStack() as stack:
        watch = Watch()
        for module in model.modules():
            if part_of_module(module):
                for handle in (
                    module.register_forward_pre_hook(watch.enter),
                    module.register_forward_hook(watch.leave),
                ):
                    stack.callback(handle.remove)
        loss = client_passes.supervised_cross_entropy

        def watched_loss(*args: Any, **kwargs: Any) -> Any:
            watch.open_parts.append(LOSS)
            try:
                return loss(*args, **kwargs)
            finally:
                watch.leave()

        stack.callback(setattr, client_passes, "supervised_cross_entropy", loss)
        client_passes.supervised_cross_entropy = watched_loss
        stack.enter_context(watch)
        yield watch


def measure(shape: str, data: Path, arguments: argparse.Namespace) -> None:
    """Print what the parts of a shape's step take."""
    model, tokenizer = load_shape(shape, data)
    arguments.ranks, arguments.budget = [8], 8192
    work = work_of(load_clients(data, tokenizer, 1, MOST_ROWS), arguments)
    floor = floor_flops(model, work)
    shares: dict[str, list[float]] = defaultdict(list)

    def step() -> object:
        return run_fedloom(model, work)

    step()  # warms up
    rates, operations = [], 0.0
    for _ in range(arguments.repeats):
        bare = cpu_seconds(step)
        with watched(model) as watch:
            step()
        rates.append(matmul_rate(model.dtype))
        seconds, operations = watch.seconds, watch.operations
        products = seconds.pop("products")
        seconds[AT_RATE] = operations / rates[-1]
        seconds[BEYOND] = products - seconds[AT_RATE]
        seconds[CALLS] = bare - sum(seconds.values())
        for part, own in seconds.items():
            shares[part].append(own / bare)
        shares["of which the floor"].append(floor / rates[-1] / bare)
    rate, least = float(np.median(rates)), shares.pop("of which the floor")
    print(f"{shape}: products at {rate / 1e9:.0f} GFLOP/s, {operations / floor:.2f} of the floor's operations")
    print(f"  {'the floor':45s} {np.median(least):6.1%} ({min(least):.0%} to {max(least):.0%})")
    means = {part: float(np.mean(found)) for part, found in shares.items()}
    for part, share in sorted(means.items(), key=lambda item: -item[1]):
        print(f"  {part:45s} {share:6.1%} ({min(shares[part]):.0%} to {max(shares[part]):.0%})")
    print(f"  {'all':45s} {sum(means.values()):6.1%}")
    largest = sorted((part for part in means if part != AT_RATE), key=lambda part: -means[part])[:3]
    print(f"  largest above the floor: {', '.join(largest)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for shape in arguments.shapes:
        measure(shape, Path(os.environ["FEDLOOM_DATA"]), arguments)


if __name__ == "__main__":
    main()
