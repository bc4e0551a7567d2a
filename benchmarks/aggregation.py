"""Aggregation at Llama-7B shapes: FLoRA's stack, exact compression, and the dense product with a full SVD.

    python benchmarks/aggregation.py [--modules 64] [--repeats 3] [--skip-full-svd]

Ten clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4 (sum 160), modules of 4096 × 4096 in fp32. The baseline is what a
method does that forms Σ p_k B_k A_k densely and takes torch's full SVD of it (FlexLoRA's rule), on one module; stack
and compression are timed on the same module, in turn, and then on all modules. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fedloom.lora.algebra import compress, compress_pair, norm_of_difference, norm_of_pair, stack, stack_pairs
from fedloom.lora.pair import Adapter, Pair
from fedloom.seeding import torch_stream

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-full-svd", action="store_true")
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


if __name__ == "__main__":
    main()
