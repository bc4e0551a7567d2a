"""Deal tasks to workers that can die: every task is answered once, in the order of the tasks.

A worker that dies is replaced, and its task is given to another one, a set number of times. What workers are, and how
one is called, is a :class:`Hiring`'s business; nothing here knows a cluster.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from fedloom.errors import RunError

AHEAD = 4
"""Tasks per worker that may be answered before their turn: they wait in memory, which is to stay flat."""
STARTS = 3
"""Times in a row that a worker may fail to start before it is given up."""
PATIENCE_SECONDS = 600.0
"""How long to wait for a worker to start where none is at work."""

Task = TypeVar("Task")
Handed = TypeVar("Handed", contravariant=True)
Call = Hashable
Greeting = Mapping[str, Any]


class WorkerLostError(Exception):
    """A worker, its machine or the way to it is gone: another may do better."""


class TaskRaisedError(Exception):
    """The worker's own code raised: another worker would raise the same."""


@dataclass(frozen=True)
class Lost:
    """Why a task has no answer."""

    reason: str


class Hiring(Protocol[Handed]):
    """Where workers come from and how they are called."""

    def hire(self) -> tuple[Any, Call]:
        """Start a worker; return it with the call that its greeting will answer."""
        ...

    def dismiss(self, worker: Any) -> None:
        """End a worker, or what is left of it."""
        ...

    def ask(self, worker: Any, task: Handed) -> Call:
        """Hand a task to a worker."""
        ...

    def first_done(self, calls: Sequence[Call], seconds: float) -> Call | None:
        """Wait for the first of several calls; None where none is done in time."""
        ...

    def answer(self, call: Call) -> Any:
        """Return what a call that is done came to.

        Raises:
            WorkerLostError, TaskRaisedError: there is no answer.
        """
        ...


@dataclass
class Crew(Generic[Task]):
    """Workers, and how tasks are dealt to them.

    Attributes:
        welcome: looks at a new worker's greeting, and raises where that worker may not take part.
        retries: times that a task is given to another worker because its worker died.
        note: told of every worker that is lost.
    """

    hiring: Hiring[Task]
    size: int
    welcome: Callable[[Greeting], None]
    retries: int = 2
    note: Callable[[str], None] = lambda message: None
    _idle: list[Any] = field(default_factory=list)
    _starting: dict[Call, tuple[Any, int]] = field(default_factory=dict)

    def start(self) -> None:
        """Hire everybody and wait until all are ready.

        Raises:
            RunError: one does not start.
            FedloomError: one is not welcome.
        """
        for _ in range(self.size):
            self._hire()
        while self._starting:
            call = self.hiring.first_done([*self._starting], PATIENCE_SECONDS)
            if call is None:
                raise RunError(
                    f"expected {self.size} workers, got {len(self._idle)} within {PATIENCE_SECONDS:.0f} s; lower "
                    "engine.workers, cpus_per_worker or gpus_per_worker, or free the cluster"
                )
            worker, _ = self._starting.pop(call)
            try:
                self.welcome(self.hiring.answer(call))
            except (WorkerLostError, TaskRaisedError) as error:
                raise RunError(f"a worker did not start: {error}; mend that, or set engine.name = local") from error
            self._idle.append(worker)

    def deal(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield each task with its answer, or with :class:`Lost`, in the order of the tasks."""
        waiting, running = list(range(len(tasks))), dict[Call, tuple[Any, int]]()
        answers: dict[int, Any] = {}
        lost = Counter[int]()
        turn = 0
        while turn < len(tasks):
            while waiting and self._idle and waiting[0] < turn + AHEAD * self.size:
                position, worker = heapq.heappop(waiting), self._idle.pop()
                running[self.hiring.ask(worker, tasks[position])] = (worker, position)
            call = self._next(running)
            if call is None:
                answers |= dict.fromkeys(waiting, Lost("no worker is left; look into their logs, then run again"))
                waiting = []
            elif call in self._starting:
                self._greet(call)
            else:
                worker, position = running.pop(call)
                found = self._answer(call, worker)
                if isinstance(found, WorkerLostError):
                    lost[position] += 1
                    if lost[position] <= self.retries:
                        heapq.heappush(waiting, position)
                        continue
                    found = Lost(f"its worker failed: {found}")
                answers[position] = found
            while turn in answers:
                yield tasks[turn], answers.pop(turn)
                turn += 1

    def _next(self, running: Mapping[Call, object]) -> Call | None:
        """Return the next call that is done; None where nothing more can be expected."""
        if running:
            # A worker at work is waited for however long it takes; its death ends the wait too.
            while True:
                call = self.hiring.first_done([*running, *self._starting], PATIENCE_SECONDS)
                if call is not None:
                    return call
        return self.hiring.first_done([*self._starting], PATIENCE_SECONDS) if self._starting else None

    def _answer(self, call: Call, worker: Any) -> Any:
        try:
            found: Any = self.hiring.answer(call)
        except TaskRaisedError as error:
            found = Lost(f"its worker raised {error}")
        except WorkerLostError as error:
            self.note(f"a worker was lost ({error}); another takes over what it was doing")
            self.hiring.dismiss(worker)
            self._hire()
            return error
        self._idle.append(worker)
        return found

    def _greet(self, call: Call) -> None:
        """Take in a worker that was hired in the place of another; give up after several that did not start."""
        worker, failed = self._starting.pop(call)
        try:
            self.welcome(self.hiring.answer(call))
        except (WorkerLostError, TaskRaisedError) as error:
            self.hiring.dismiss(worker)
            if failed + 1 < STARTS:
                self._hire(failed + 1)
            else:
                self.note(f"a worker did not start {STARTS} times ({error}); the run goes on with fewer")
            return
        self._idle.append(worker)

    def _hire(self, failed: int = 0) -> None:
        worker, call = self.hiring.hire()
        self._starting[call] = (worker, failed)
