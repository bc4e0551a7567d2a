"""Over how many threads passes on one base are spread by default: as many as this process has cores for.

Their number changes no bit of a result, so that it may differ from machine to machine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from fedloom.training.rotation import switching_rotaries
from fedloom.training.row_passes import PackedPasses, row_passes

PART_TOKENS = 1024
"""Tokens of a pass where cores may share the work: small enough that all have one, and more costs no less."""

T = TypeVar("T")
R = TypeVar("R")

_sharers = 1


def share_cores(processes: int) -> None:
    """Leave this process its part of the cores, where so many of its kind run side by side."""
    global _sharers
    _sharers = processes


def own_cores(token_budget: int, threads: int = 1) -> int:
    """Return the threads of a step where nobody set them, as at a site, each with so many ``threads`` of arithmetic."""
    return fitting(_usable() // _sharers // threads, token_budget)


def fitting(cores: int, token_budget: int) -> int:
    """Return how many of these threads together hold no more than ``token_budget`` tokens, one at least."""
    return max(1, min(cores, token_budget // PART_TOKENS))


def spread_passes(model: Any, device: str, token_budget: int, cores: int) -> tuple[int, int]:
    """Return the tokens of a pass at most, which no number of ``cores`` changes, and how many are under way at once.

    Several may be in a model on a CPU, where rows are packed and no embedding keeps a state.
    """
    if device == "cpu" and isinstance(row_passes(model), PackedPasses) and not switching_rotaries(model):
        return min(token_budget, PART_TOKENS), cores
    return token_budget, 1


def in_threads(work: Callable[[T], R], items: Sequence[T], cores: int) -> Iterator[R]:
    """Yield what ``work`` returns of each item, in their order, in so many threads that compute as this one does.

    Items begin in their order. None begins after one has failed, and each that has been taken runs: a pass whose
    gradients wait for those of an earlier one waits for a pass that ends.
    """
    if cores == 1 or len(items) < 2:
        yield from map(work, items)
        return
    inside = torch.get_num_threads()
    found = [Future[R]() for _ in items]
    waiting = deque(zip(items, found, strict=True))

    def take() -> None:
        torch.set_num_threads(inside)
        while waiting:
            try:
                item, future = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                future.set_result(work(item))
            except BaseException as error:
                waiting.clear()
                future.set_exception(error)

    with ThreadPoolExecutor(cores, "fedloom-pass") as threads:
        try:
            for _ in range(min(cores, len(items))):
                threads.submit(take)
            for future in found:
                yield future.result()
        finally:
            waiting.clear()


def _usable() -> int:
    """Return the cores that this process may run on; an operating system that does not tell has them all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
