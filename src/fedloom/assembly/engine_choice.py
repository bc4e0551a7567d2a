"""Settings become an engine: started before the first round, stopped after the last, whatever ends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedloom.assembly.clients_at_once import clients_at_once_here
from fedloom.assembly.inputs import Inputs
from fedloom.assembly.round_plan import Population, training_of
from fedloom.clients.memory import Memory
from fedloom.config import Settings
from fedloom.data.tokens import TokenSet
from fedloom.engines.local_engine import LocalEngine
from fedloom.engines.running import RunningEngine
from fedloom.errors import MethodError, ModelError
from fedloom.federation.blob import WireDtype
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods import table
from fedloom.methods.client_half import ClientHalf
from fedloom.methods.state import ServerState
from fedloom.models.load import Base
from fedloom.training.cohort_round import StepReport
from fedloom.training.row_losses import PassLosses, score_pass, scoring_passes


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What an engine is made in: the base, the rows, and who is told of a step and of what happens to workers."""

    base: Base
    lora: LoRAModel
    inputs: Inputs
    population: Population
    on_step: Callable[[StepReport], None]
    note: Callable[[str], None]


def check_engine(settings: Settings) -> None:
    """Check, before anything dear is loaded, that what the engine needs is installed.

    Raises:
        MissingExtraError: Ray is not.
        MethodError: the method is known to this process only, and no worker could load it.
    """
    if settings.engine.name != "ray":
        return
    from fedloom.engines.ray_cluster import ray_module

    ray_module(settings.engine.address)
    if table.get(settings.method.name).is_local:
        raise MethodError(
            f"method.name = {settings.method.name}: expected a method of an installed package, which a worker can "
            "load, got one registered in this process; install it, or set engine.name = local"
        )


def engine_of(
    settings: Settings, around: Surroundings, half: ClientHalf, state: ServerState, memories: dict[int, Memory]
) -> AbstractContextManager[RunningEngine]:
    """Return the engine that trains the population, from a state on; what it holds is let go of at the end.

    Raises:
        MissingExtraError: Ray is not installed.
        RunError: Ray does not start, or has no room for the workers.
        ModelError: a worker has another base.
    """
    if settings.engine.name == "ray":
        if not settings.traits.is_control:
            return _ray(settings, around, half, state, memories)
        around.note(trains_here(settings))
    return _local(settings, around, half, state, memories)


def trains_here(settings: Settings) -> str:
    """Say that a method does not use the workers."""
    return f"{settings.method.name} trains in this process: engine.name = ray deals out the clients of other methods"


@contextmanager
def _local(
    settings: Settings, around: Surroundings, half: ClientHalf, state: ServerState, memories: dict[int, Memory]
) -> Iterator[LocalEngine]:
    yield LocalEngine(
        lora=around.lora,
        rows_of=around.population.rows_of,
        training=training_of(settings),
        seed=settings.run.seed,
        wire=None if settings.traits.is_control else WireDtype(settings.wire.dtype),
        clients_at_once=_clients_at_once(settings, around),
        half=half,
        memories=memories,
        version=state.round,
        side=state.side,
        on_step=around.on_step,
    )


@contextmanager
def _ray(
    settings: Settings, around: Surroundings, half: ClientHalf, state: ServerState, memories: dict[int, Memory]
) -> Iterator[RunningEngine]:
    from fedloom.engines.ray_cluster import RayHiring, Resources, num_workers, running_ray

    chosen, device = settings.engine, _device(around.lora)
    gpus = chosen.gpus_per_worker if chosen.gpus_per_worker is not None else float(device == "cuda")
    resources = Resources(chosen.cpus_per_worker, gpus, chosen.workers)
    with running_ray(chosen.address, resources) as ray:
        from fedloom.assembly import cluster_worker
        from fedloom.engines.crew import Crew
        from fedloom.engines.ray_engine import RayEngine
        from fedloom.engines.ray_worker import Worker

        here = cluster_worker.proof_of(around.base, around.lora)

        def welcome(greeting: Mapping[str, Any]) -> None:
            if (differs := cluster_worker.difference(here, greeting)) is not None:
                raise ModelError(f"{differs}; install and copy the same to every machine of the cluster")

        size = num_workers(ray, resources)
        around.note(f"starting {size} workers on Ray")
        arrays = [ray.put(array) for array in cluster_worker.arrays_of(around.inputs)]
        arguments = (cluster_worker.furnish, cluster_worker.document_of(settings), *arrays)
        hiring = RayHiring(ray, Worker, arguments, resources)
        crew = Crew(hiring, size, welcome, chosen.retries, around.note)
        try:
            crew.start()
            yield RayEngine(
                crew=crew,
                put=ray.put,
                score_here=_score_here(around.lora),
                half=half,
                shapes=around.lora.shapes,
                seed=settings.run.seed,
                wire=WireDtype(settings.wire.dtype),
                clients_at_once=_clients_at_once(settings, around),
                memories=memories,
                version=state.round,
                side=state.side,
                passes_of=partial(scoring_passes, around.lora.model),
            )
        finally:
            hiring.dismiss_all()


def _clients_at_once(settings: Settings, around: Surroundings) -> int:
    chosen, limit = clients_at_once_here(settings, around.lora)
    if limit is not None:
        around.note(limit)
    return chosen


def _device(lora: LoRAModel) -> str:
    return str(next(lora.model.parameters()).device.type)


def _score_here(lora: LoRAModel) -> Callable[[Adapter, TokenSet, Sequence[int]], PassLosses]:
    def score(adapter: Adapter, rows: TokenSet, members: Sequence[int]) -> PassLosses:
        lora.set_side(adapter or None)
        lora.route_all(None)
        return score_pass(lora, rows, members)

    return score
