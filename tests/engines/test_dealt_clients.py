"""Clients dealt to workers give the bits of one process, for every method: the engine and its workers without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.assembly import cluster_worker
from fedloom.assembly.cluster_worker import furnish
from fedloom.assembly.engine_choice import Surroundings
from fedloom.assembly.inputs import Workshop
from fedloom.clients.memory import Memory
from fedloom.config import Settings
from fedloom.engines import ray_worker
from fedloom.engines.crew import Call, Crew, WorkerLostError
from fedloom.engines.ray_engine import RayEngine
from fedloom.engines.ray_worker import Station, Worker
from fedloom.errors import ModelError
from fedloom.experiment import loop, run
from fedloom.federation.blob import WireDtype
from fedloom.methods import table
from fedloom.methods.client_half import ClientHalf
from fedloom.methods.state import ServerState
from fedloom.seeding import stream
from fedloom.training.row_losses import score_pass

Make = Callable[..., Settings]


def kept(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def figures(folder: Path) -> list[Any]:
    """Return what the rounds came to, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("eval", "train_loss_nats", "upload_bytes", "download_bytes", "aggregation_noise", "change_norm")
    return [[record[name] for name in names] for record in records]


class InThisProcess:
    """Workers as plain objects. They are called when asked for an answer, in an order drawn by a seed, and may die."""

    def __init__(self, arguments: tuple[Any, ...], seed: int, deaths: int = 0) -> None:
        self.arguments, self.rng, self.deaths = arguments, stream(seed, "order"), deaths
        self.calls: dict[Call, Callable[[], Any]] = {}
        self.lost = 0

    def hire(self) -> tuple[Worker, Call]:
        worker = Worker(*self.arguments)
        return worker, self._call(lambda: {"node": "here"})

    def dismiss(self, worker: Worker) -> None:
        self.lost += 1

    def ask(self, worker: Worker, task: Any) -> Call:
        arguments = task.arguments()
        return self._call(lambda: getattr(worker, task.method)(*arguments))

    def first_done(self, calls: Sequence[Call], seconds: float) -> Call:
        return calls[int(self.rng.integers(len(calls)))]

    def answer(self, call: Call) -> Any:
        found = self.calls.pop(call)()
        if self.deaths > self.lost and isinstance(found, list) and self.rng.random() < 0.5:
            raise WorkerLostError("killed after its work, before it could answer")
        return found

    def _call(self, act: Callable[[], Any]) -> Call:
        call = object()
        self.calls[call] = act
        return call


def dealing(workers: int, deaths: int = 0, *, hired: list[InThisProcess] | None = None) -> Callable[..., Any]:
    """Return what takes the place of ``engine_of``: the engine with workers in this process."""

    @contextmanager
    def engine_of(
        settings: Settings, around: Surroundings, half: ClientHalf, state: ServerState, memories: dict[int, Memory]
    ) -> Iterator[RayEngine]:
        document, arrays = cluster_worker.document_of(settings), cluster_worker.arrays_of(around.inputs)
        hiring = InThisProcess((cluster_worker.furnish, document, *arrays), workers, deaths)
        if hired is not None:
            hired.append(hiring)
        crew: Crew[Any] = Crew(hiring, workers, lambda greeting: None, retries=deaths)
        crew.start()
        yield RayEngine(
            crew=crew,
            put=lambda value: value,
            score_here=lambda adapter, rows, members: score_pass(around.lora, rows, members),
            half=half,
            shapes=around.lora.shapes,
            seed=settings.run.seed,
            wire=WireDtype(settings.wire.dtype),
            memories=memories,
            version=state.round,
            side=state.side,
        )

    return engine_of


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let references be what they lead to."""
    monkeypatch.setattr(ray_worker, "fetched", lambda reference: reference)


def of_method(make: Make, method: str, **overrides: object) -> Settings:
    ranks: object = 2 if table.traits_of(method).needs_one_rank else [4, 2, 1]
    return make(
        method__name=method,
        method__ranks=ranks,
        federation__num_rounds=3,
        federation__clients_per_round=2,
        training__dropout=0.1,
        evaluation__batch_tokens=40,
        **overrides,
    )


@pytest.mark.parametrize("wire", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", table.shipped("aggregates"))
def test_every_method_gives_the_bits_of_one_process_at_any_number_of_workers(
    method: str, wire: str, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = of_method(settings_for, method, wire__dtype=wire)
    run(settings, tmp_path / "local")
    for workers in (1, 2, 3) if wire == "fp32" else (2,):
        monkeypatch.setattr(loop, "engine_of", dealing(workers))
        run(settings, tmp_path / str(workers))
        assert kept(tmp_path / str(workers)) == kept(tmp_path / "local")
        assert figures(tmp_path / str(workers)) == figures(tmp_path / "local")


def test_a_sketch_is_dealt_out_to_the_bits_of_one_process(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = of_method(settings_for, "weave", wire__dtype="int4", method__initialisation="gradient")
    run(settings, tmp_path / "local")
    monkeypatch.setattr(loop, "engine_of", dealing(2))
    run(settings, tmp_path / "dealt")
    assert kept(tmp_path / "dealt") == kept(tmp_path / "local")
    assert figures(tmp_path / "dealt") == figures(tmp_path / "local")


@pytest.mark.parametrize("method", ["flora", "fedit", "rolora"])
def test_workers_that_die_with_their_work_done_change_nothing(
    method: str, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, hired = of_method(settings_for, method), list[InThisProcess]()
    run(settings, tmp_path / "local")
    monkeypatch.setattr(loop, "engine_of", dealing(2, deaths=5, hired=hired))
    run(settings, tmp_path / "dealt")
    assert hired[0].lost == 5
    assert kept(tmp_path / "dealt") == kept(tmp_path / "local")
    assert figures(tmp_path / "dealt") == figures(tmp_path / "local")


def test_a_run_goes_on_with_another_engine_to_the_same_bits(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = loop.engine_of
    for method in ("flora", "rolora"):
        run(of_method(settings_for, method), tmp_path / method)
        for rounds, engine in ((1, own), (2, dealing(2)), (3, own)):
            monkeypatch.setattr(loop, "engine_of", engine)
            settings = of_method(settings_for, method)
            more = settings.federation.model_copy(update={"num_rounds": rounds})
            run(settings.model_copy(update={"federation": more}), tmp_path / f"{method}-parts")
        assert kept(tmp_path / f"{method}-parts/adapter") == kept(tmp_path / f"{method}/adapter")


def break_training(model: Any) -> None:
    """Let a base score as always, and raise where it is trained."""
    mlp = model.model.layers[0].mlp
    forward = mlp.forward

    def broken(x_TD: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise IndexError("too many indices\nand more")
        return forward(x_TD)

    mlp.forward = broken


def furnished_with_a_base_that_raises(*given: Any) -> Station:
    station = furnish(*given)
    break_training(station.base.lora.model)
    return station


def test_a_base_that_a_worker_cannot_train_ends_the_run_in_the_line_of_one_process(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_worker, "furnish", furnished_with_a_base_that_raises)
    monkeypatch.setattr(loop, "engine_of", dealing(2))
    with pytest.raises(ModelError, match=r"^model\.base: the forward of 'llama' raised IndexError: too many") as told:
        run(settings_for(), tmp_path / "dealt")
    monkeypatch.undo()
    workshop = Workshop()
    break_training(workshop.base(settings_for())[0].model)
    with pytest.raises(ModelError) as here:
        run(settings_for(), tmp_path / "local", workshop=workshop)
    assert str(told.value) == str(here.value)
    assert "client" not in str(told.value)
