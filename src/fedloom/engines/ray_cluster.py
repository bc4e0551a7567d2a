"""Ray: started on this machine or joined where it runs, its actors as a crew's workers, all of it gone at the end."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]

from fedloom.engines.crew import Call, TaskRaisedError, WorkerLostError
from fedloom.errors import MissingExtraError, RunError

PREFIX = "fedloom-ray-"
_STARTS = 2
"""Ray waits 30 s for its own parts and no setting changes that: a busy machine gets a second try."""
_SETTLE_SECONDS = 15.0
_KNOCK_SECONDS = 10.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's own switch for one machine: every part of it then listens on the loopback address alone."""


class Errand(Protocol):
    """A task: the worker's method, and its arguments, made when the task is handed out."""

    @property
    def method(self) -> str:
        """Name of the worker's method."""
        ...

    def arguments(self) -> tuple[Any, ...]:
        """Make the arguments."""
        ...


@dataclass
class Resources:
    """What a worker has for itself, and how many workers there are by default."""

    cpus: float
    gpus: float
    workers: int | None


@contextmanager
def running_ray(address: str | None, resources: Resources) -> Iterator[Any]:
    """Yield the module ``ray``, connected; a Ray started here ends with the block, one that ran before goes on.

    Raises:
        MissingExtraError: Ray is not installed.
        RunError: it does not start, or nothing answers at the address.
    """
    ray = ray_module(address)
    if ray.is_initialized():
        yield ray
        return
    folder = None if address is not None else _folder()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        _connect(ray, address, folder, resources)
        yield ray
    finally:
        started = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
        ray.shutdown()
        if address is None:
            _end(started)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def ray_module(address: str | None) -> Any:
    """Import Ray, quiet and, where it is started here, on the loopback address.

    Raises:
        MissingExtraError: it is not installed.
    """
    for name, value in (_QUIET if address is not None else _QUIET | _LOOPBACK).items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray._private.ray_constants
    except ImportError as error:
        raise MissingExtraError("cluster", "engine.name = ray") from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    if address is None:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # what the variable says, where Ray was imported before
    return ray


def _folder() -> Path:
    """Make the folder of a Ray session, and remove those whose process was killed.

    The names of its sockets are long, and a socket's may have 107 bytes: a long folder for temporary files is no use.
    """
    parent = Path(tempfile.gettempdir())
    parent = parent if len(str(parent)) <= 16 else Path("/tmp")
    for old in parent.glob(f"{PREFIX}*"):
        if (pid := old.name.removeprefix(PREFIX).partition("-")[0]).isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))


def _connect(ray: Any, address: str | None, folder: Path | None, resources: Resources) -> None:
    shared: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL", "configure_logging": False}
    if address is not None:
        try:
            _knock(address)
            _show_token()
            ray.init(address=address, **shared)
        except Exception as error:
            ray.shutdown()
            raise RunError(
                f"engine.address: expected a running Ray cluster at {address!r}, got: {_line(error)}; check the "
                "address, or start one with: ray start --head"
            ) from error
        return
    cores = max(os.cpu_count() or 1, -(-(resources.workers or 1) * resources.cpus // 1))
    for attempt in range(_STARTS):
        try:
            ray.init(num_cpus=int(cores), include_dashboard=False, _temp_dir=str(folder), **shared)
        except Exception as error:
            ray.shutdown()
            if attempt + 1 == _STARTS:
                raise RunError(
                    f"engine.name = ray: expected Ray to start on this machine, got: {_line(error)}; run the same "
                    "command again when it is less busy, or set engine.name = local"
                ) from error
        else:
            return


def _knock(address: str) -> None:
    """Connect to ``host:port`` once: where nothing answers, Ray would try for minutes.

    Raises:
        OSError: nothing answers.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()


def _show_token() -> None:
    """Join with the token that this user has: Ray does so where it finds a cluster, and not at an address.

    A run on this machine leaves a token in ``~/.ray``, and from then on `ray start` asks for it.
    """
    with suppress(ImportError):  # Ray has no public name for it, and earlier versions have no tokens
        from ray._private.authentication import authentication_token_setup

        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait until Ray's processes are gone, and end those that stay."""
    _, alive = psutil.wait_procs(processes, timeout=_SETTLE_SECONDS)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=_SETTLE_SECONDS)


def num_workers(ray: Any, resources: Resources) -> int:
    """Return how many workers there are: as asked, else one per GPU's share, else one per two cores.

    Raises:
        RunError: the cluster has not got the processors for one, or for as many as were asked for.
    """
    has = ray.cluster_resources()
    cpus, gpus = float(has.get("CPU", 0)), float(has.get("GPU", 0))
    room = int(cpus // resources.cpus)
    wanted = resources.workers or max(1, min(room, int(cpus // 2)))
    if resources.gpus > 0:
        room = min(room, int(gpus / resources.gpus + 1e-9))
        wanted = resources.workers or room
    if wanted > room or room < 1:
        raise RunError(
            f"engine.workers: expected at most {room} (cluster: {cpus:g} CPUs, {gpus:g} GPUs; a worker: "
            f"{resources.cpus:g} and {resources.gpus:g}), got {max(wanted, 1)}; lower it, or engine.cpus_per_worker or "
            "gpus_per_worker"
        )
    return wanted


@dataclass
class RayHiring:
    """Actors as workers. ``arguments`` are those of the actor; its arrays are references, kept here."""

    ray: Any
    actor: Any
    arguments: tuple[Any, ...]
    resources: Resources
    _hired: list[Any] = field(default_factory=list)

    def hire(self) -> tuple[Any, Call]:
        """Start an actor and ask for its greeting."""
        options = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus, "max_restarts": 0}
        worker = self.ray.remote(**options)(self.actor).remote(*self.arguments)
        self._hired.append(worker)
        return worker, worker.greeting.remote()

    def dismiss(self, worker: Any) -> None:
        """Kill an actor: what it holds is free again."""
        self._hired = [one for one in self._hired if one is not worker]
        self.ray.kill(worker)

    def dismiss_all(self) -> None:
        """Kill every actor, where the Ray they are on goes on."""
        while self._hired:
            self.ray.kill(self._hired.pop())

    def ask(self, worker: Any, task: Errand) -> Call:
        """Call an actor's method."""
        call: Call = getattr(worker, task.method).remote(*task.arguments())
        return call

    def first_done(self, calls: Sequence[Call], seconds: float) -> Call | None:
        """Wait for the first of several calls."""
        done, _ = self.ray.wait(list(calls), num_returns=1, timeout=seconds)
        return done[0] if done else None

    def answer(self, call: Call) -> Any:
        """Fetch an answer; an error of the worker's own code is told from the loss of the worker."""
        try:
            return self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            raise TaskRaisedError(_line(error.cause if error.cause is not None else error)) from error
        except self.ray.exceptions.RayError as error:
            raise WorkerLostError(_line(error)) from error


def _line(error: BaseException) -> str:
    """Return an error in one short line: of Ray's own many, the last that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if len(lines) > 1 and "Traceback" in str(error) else (lines or [""])[0]
    return f"{type(error).__name__}: {last[:300]}" if last else type(error).__name__
