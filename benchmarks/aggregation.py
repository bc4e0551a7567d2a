"""Aggregation at Llama-7B shapes: FLoRA's stack, exact compression, and the dense product with a full SVD.

    python benchmarks/aggregation.py [--modules 64] [--repeats 3] [--skip-full-svd] [--skip-rounds]

Ten clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4 (sum 160), modules of 4096 × 4096 in fp32. The baseline is what a
method does that forms Σ p_k B_k A_k densely and takes torch's full SVD of it (FlexLoRA's rule), on one module; stack
and compression are timed on the same module, in turn, and then on all modules. Prints medians and ratios.

Then the server's part of one round of weave on all modules, in both forms: updates taken in one by one, the next state,
and a broadcast in few bits for every client. Updates are drawn outside the clock.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fedloom import config
from fedloom.assembly.round_plan import rules_of, strategy_of
from fedloom.federation.server import broadcasts_for, next_state, views_after
from fedloom.lora.algebra import compress, compress_pair, norm_of_difference, norm_of_pair, stack, stack_pairs, truncate
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.side import digest
from fedloom.methods.state import ServerState, Update
from fedloom.methods.strategy import Cohort
from fedloom.seeding import torch_stream
from fedloom.training.stats import TrainingStats

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
WIDTH = 4096


def client_pair(client: int, rank: int) -> Pair:
    """Draw a client's pair with the sizes that training gives."""
    generator = torch_stream(1, "benchmark", client)
    b_OR = torch.randn(WIDTH, rank, generator=generator) * 1e-3
    return Pair(b_OR, torch.randn(rank, WIDTH, generator=generator) / WIDTH**0.5)


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def dense_full_svd(pairs: list[Pair], shares: list[float]) -> Pair:
    """Form the mean product, decompose all of it, keep what is above rounding."""
    product = torch.zeros(WIDTH, WIDTH)
    for pair, share in zip(pairs, shares, strict=True):
        product.addmm_(pair.b_OR, pair.a_RI, alpha=share)
    u, sigma, vt = torch.linalg.svd(product, full_matrices=False)
    kept = sum(RANKS)
    return Pair(u[:, :kept] * sigma[:kept], vt[:kept])


def weave_round(num_modules: int, local_steps: int) -> dict[str, float]:
    """Return the seconds of each part of a server's second round; by then every client's start is known."""
    settings = config.resolve(
        {
            "method": {"name": "weave", "ranks": list(RANKS)},
            "federation": {"num_clients": len(RANKS)},
            "training": {"local_steps": local_steps, "batch_size": 4},
        },
        "a benchmark",
    )
    shapes = {f"m{m}": (WIDTH, WIDTH) for m in range(num_modules)}
    strategy = strategy_of(settings, Cohort(shapes, max(RANKS), RANKS.__getitem__, seed=1))
    rules, state = rules_of(settings, shapes), strategy.initial()
    ranks, scales = dict(enumerate(RANKS)), dict.fromkeys(range(len(RANKS)), 1.0)
    for round in (1, 2):
        begun = time.perf_counter()
        broadcasts = broadcasts_for(state, ranks, strategy, ranks, scales, rules.wire)
        sent = time.perf_counter()
        sums, taken_s = strategy.empty(state), 0.0
        for update in moved(state, round):
            taken_s += seconds(partial(sums.add, update))
        finished = time.perf_counter()
        aggregate = strategy.finish(state, sums)
        began = {one.client: digest(one.difference.after) for one in broadcasts if one.difference is not None}
        views = views_after(state, broadcasts, began)
        state = next_state(state, aggregate, rules, [1.0], dict.fromkeys(ranks, round), views=views)
        ended = time.perf_counter()
    return {"broadcasts": sent - begun, "updates taken in": taken_s, "next state": ended - finished}


def moved(state: ServerState, round: int) -> Iterator[Update]:
    """Draw what every client sends, one after the other: its slots of the start, moved a little."""
    assert state.start is not None
    for client, rank in enumerate(RANKS):
        generator = torch_stream(1, "benchmark", round, client)
        tensors = {
            key: tensor + torch.randn(tensor.shape, generator=generator) * 1e-3
            for key, tensor in truncate(state.start, rank).as_tensors().items()
        }
        yield Update(round, client, Adapter.from_tensors(tensors), TrainingStats(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-full-svd", action="store_true")
    parser.add_argument("--skip-rounds", action="store_true")
    options = parser.parse_args()
    pairs, shares = [client_pair(k, r) for k, r in enumerate(RANKS)], [1 / len(RANKS)] * len(RANKS)
    stacked = stack_pairs(pairs, shares)
    compress_pair(stacked)
    stack_s = [seconds(lambda: stack_pairs(pairs, shares)) for _ in range(options.repeats)]
    compress_s, full_s = [], []
    for _ in range(options.repeats):
        compress_s.append(seconds(lambda: compress_pair(stacked)))
        if not options.skip_full_svd:
            full_s.append(seconds(lambda: dense_full_svd(pairs, shares)))
    error = norm_of_difference(compress_pair(stacked).pair, stacked) / norm_of_pair(stacked)
    print(f"one module {WIDTH} × {WIDTH}, ranks summing to {sum(RANKS)}, {torch.get_num_threads()} threads")
    print(f"  stack              {1e3 * statistics.median(stack_s):10.1f} ms")
    print(f"  exact compression  {1e3 * statistics.median(compress_s):10.1f} ms   relative error {error:.1e}")
    if full_s:
        ratios = [slow / fast for slow, fast in zip(full_s, compress_s, strict=True)]
        ratio = statistics.median(ratios)
        print(f"  dense + full SVD   {1e3 * statistics.median(full_s):10.1f} ms   {ratio:.0f} × compression")
    adapters = [Adapter({f"m{m}": pair for m in range(options.modules)}) for pair in pairs]
    whole_stack = seconds(lambda: stack(adapters, shares))
    whole = stack(adapters, shares)
    whole_compress = seconds(lambda: compress(whole))
    print(f"{options.modules} modules: stack {whole_stack:.2f} s, exact compression {whole_compress:.2f} s")
    for form, local_steps in () if options.skip_rounds else (("synchronised steps", 1), ("short rounds", 5)):
        parts = weave_round(options.modules, local_steps)
        told = ", ".join(f"{name} {took:.2f} s" for name, took in parts.items())
        print(f"{options.modules} modules, weave, {form}: {sum(parts.values()):.2f} s ({told})")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
