"""Over how many threads a run spreads the rows of a step: by its settings, or by the cores that it may use."""

from __future__ import annotations

from fedloom.config import Settings
from fedloom.training.cores import fitting, own_cores


def cores_here(settings: Settings) -> int:
    """Return the threads of a step: what the settings say, else those that have a core and fit the token budget.

    A worker of Ray has the cores that are reserved for it. Every thread holds a part of a pass, so that together they
    hold no more than one pass of ``training.token_budget``.
    """
    engine = settings.engine
    if engine.cores is not None:
        return engine.cores
    if engine.name == "ray":
        return fitting(int(engine.cpus_per_worker) // engine.threads, settings.training.token_budget)
    return own_cores(settings.training.token_budget, engine.threads)
