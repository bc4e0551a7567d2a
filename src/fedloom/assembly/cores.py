"""Over how many threads the rows of a step are spread: by the settings, or by the cores that this process may use.

Their number changes no bit of the result, so that it may differ from machine to machine.
"""

from __future__ import annotations

import os

from fedloom.config import Settings
from fedloom.training.client_passes import PART_TOKENS

_sharers = 1


def share_cores(processes: int) -> None:
    """Leave this process its part of the cores, where so many of its kind run side by side."""
    global _sharers
    _sharers = processes


def cores_here(settings: Settings) -> int:
    """Return the threads of a step: what the settings say, else those that have a core and fit the token budget.

    A worker of Ray has the cores that are reserved for it. Every thread holds a pass of its own, of ``PART_TOKENS``
    tokens, so that together they hold no more than one pass of ``training.token_budget``.
    """
    engine = settings.engine
    if engine.cores is not None:
        return engine.cores
    if engine.name == "ray":
        return _fitting(int(engine.cpus_per_worker) // engine.threads, settings.training.token_budget)
    return own_cores(settings.training.token_budget, engine.threads)


def own_cores(token_budget: int, threads: int = 1) -> int:
    """Return the threads of a step where nobody set them, as at a site, each with so many ``threads`` of arithmetic."""
    return _fitting(_usable() // _sharers // threads, token_budget)


def _fitting(cores: int, token_budget: int) -> int:
    return max(1, min(cores, token_budget // PART_TOKENS))


def _usable() -> int:
    """Return the cores that this process may run on; an operating system that does not tell has them all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
