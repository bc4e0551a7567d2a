"""Settings become an engine: started before the first round, stopped after the last, whatever ends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fedloom.assembly.round_plan import Population, training_of
from fedloom.clients.memory import Memory
from fedloom.config import Settings
from fedloom.engines.local_engine import LocalEngine
from fedloom.engines.running import RunningEngine
from fedloom.federation.blob import WireDtype
from fedloom.lora.layer import LoRAModel
from fedloom.methods.client_half import ClientHalf
from fedloom.methods.state import ServerState
from fedloom.training.cohort_round import StepReport

CLIENTS_AT_ONCE = {"cpu": 1, "mps": 1, "cuda": 16}
"""Adapters open together by device: a CPU is busy with one client's batch, a GPU is not."""


@contextmanager
def engine_of(
    settings: Settings,
    population: Population,
    lora: LoRAModel,
    half: ClientHalf,
    state: ServerState,
    memories: dict[int, Memory],
    on_step: Callable[[StepReport], None],
) -> Iterator[RunningEngine]:
    """Yield the engine that trains the population, from a state on; what it holds is let go of at the end."""
    device: Any = next(lora.model.parameters()).device
    yield LocalEngine(
        lora=lora,
        rows_of=population.rows_of,
        training=training_of(settings),
        seed=settings.run.seed,
        wire=None if settings.traits.is_control else WireDtype(settings.wire.dtype),
        clients_at_once=CLIENTS_AT_ONCE[device.type],
        half=half,
        memories=memories,
        version=state.round,
        side=state.side,
        on_step=on_step,
    )
