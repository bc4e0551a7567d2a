"""Dealing to workers that die, without any cluster: every task is answered once, in order, whoever is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedloom.engines.crew import AHEAD, STARTS, Call, Crew, Lost, TaskRaisedError, WorkerLostError
from fedloom.errors import ModelError, RunError
from fedloom.seeding import stream


@dataclass
class Scripted:
    """Workers that answer ten times a task, in an order drawn by a seed; what goes wrong is written down before.

    Attributes:
        deaths: by task, how often the worker that has it dies.
        raising: tasks at which a worker's own code raises.
        no_starts: how many of the workers hired from number ``first`` on do not start.
    """

    seed: int = 1
    deaths: dict[int, int] = field(default_factory=dict)
    raising: tuple[int, ...] = ()
    no_starts: int = 0
    first: int = 2
    greetings: list[dict[str, Any]] = field(default_factory=list)
    hired: int = 0
    dismissed: list[int] = field(default_factory=list)
    handed: list[int] = field(default_factory=list)
    most_ahead: int = 0
    answered: set[int] = field(default_factory=set)
    stuck: bool = False

    def __post_init__(self) -> None:
        self.rng, self.calls = stream(self.seed, "order"), dict[Call, tuple[str, int]]()

    def hire(self) -> tuple[int, Call]:
        self.hired += 1
        call = ("greeting", self.hired)
        self.calls[call] = call
        return self.hired, call

    def dismiss(self, worker: int) -> None:
        self.dismissed.append(worker)

    def ask(self, worker: int, task: int) -> Call:
        self.handed.append(task)
        call = ("task", len(self.handed))
        self.calls[call] = ("task", task)
        return call

    def first_done(self, calls: Sequence[Call], seconds: float) -> Call | None:
        return None if self.stuck else calls[int(self.rng.integers(len(calls)))]

    def answer(self, call: Call) -> Any:
        kind, number = self.calls[call]
        if kind == "greeting":
            if number >= self.first and self.no_starts:
                self.no_starts -= 1
                raise WorkerLostError("it did not start")
            return self.greetings.pop(0) if self.greetings else {}
        if self.deaths.get(number, 0):
            self.deaths[number] -= 1
            raise WorkerLostError("killed")
        if number in self.raising:
            raise TaskRaisedError("ValueError: a bug")
        self.answered.add(number)
        first_missing = next(task for task in range(10_000) if task not in self.answered)
        self.most_ahead = max(self.most_ahead, number - first_missing)
        return 10 * number


def crew_of(hiring: Scripted, size: int = 3, retries: int = 2) -> Crew[int]:
    crew: Crew[int] = Crew(hiring, size, lambda greeting: None, retries)
    crew.start()
    return crew


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_answers_come_in_the_order_of_the_tasks_whoever_dies_when(seed: int, size: int) -> None:
    rng = stream(seed, "deaths")
    deaths = {task: int(rng.integers(0, 3)) for task in range(20)}
    hiring = Scripted(seed, dict(deaths))
    dealt = list(crew_of(hiring, size).deal(list(range(20))))
    assert dealt == [(task, 10 * task) for task in range(20)]
    assert len(hiring.dismissed) == sum(deaths.values())
    assert sorted(hiring.handed) == sorted(task for task in range(20) for _ in range(1 + deaths[task]))


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_task_whose_workers_keep_dying_is_lost_after_its_retries_and_no_other_is(retries: int) -> None:
    hiring = Scripted(deaths={4: retries + 1, 7: retries})
    dealt = dict(crew_of(hiring, retries=retries).deal(list(range(9))))
    assert dealt.pop(4) == Lost("its worker failed: killed")
    assert dealt == {task: 10 * task for task in range(9) if task != 4}
    assert hiring.handed.count(4) == retries + 1


def test_what_a_worker_s_own_code_raises_is_not_tried_elsewhere() -> None:
    hiring = Scripted(raising=(2,))
    dealt = dict(crew_of(hiring).deal([0, 1, 2, 3]))
    assert dealt[2] == Lost("its worker raised ValueError: a bug")
    assert hiring.handed.count(2) == 1
    assert not hiring.dismissed


def test_answers_that_wait_for_their_turn_are_few_however_many_tasks_there_are() -> None:
    hiring = Scripted()
    assert len(list(crew_of(hiring, size=2).deal(list(range(500))))) == 500
    assert hiring.most_ahead <= AHEAD * 2


def test_the_last_worker_that_does_not_come_back_loses_what_is_left() -> None:
    hiring, told = Scripted(deaths={3: 1}, no_starts=STARTS), list[str]()
    crew: Crew[int] = Crew(hiring, 1, lambda greeting: None, note=told.append)
    crew.start()
    dealt = dict(crew.deal([1, 2, 3, 4]))
    assert (dealt[1], dealt[2]) == (10, 20)
    assert dealt[3] == dealt[4] == Lost("no worker is left; look into their logs, then run again")
    assert told[-1].startswith(f"a worker did not start {STARTS} times")
    assert dict(crew.deal([5])) == {5: dealt[4]}


def test_a_worker_that_starts_at_the_last_try_takes_part() -> None:
    hiring = Scripted(deaths={3: 1}, no_starts=STARTS - 1)
    assert dict(crew_of(hiring, size=1).deal([1, 2, 3])) == {1: 10, 2: 20, 3: 30}


def test_a_crew_that_does_not_start_is_one_error() -> None:
    with pytest.raises(RunError, match="a worker did not start: it did not start"):
        crew_of(Scripted(no_starts=1))
    with pytest.raises(RunError, match="expected 3 workers, got 0 within"):
        crew_of(Scripted(stuck=True))


def test_a_worker_that_differs_is_refused_at_the_start_and_in_the_place_of_another() -> None:
    def welcome(greeting: Any) -> None:
        if greeting.get("base") == "other":
            raise ModelError("another base")

    with pytest.raises(ModelError, match="another base"):
        Crew(Scripted(greetings=[{}, {"base": "other"}]), 2, welcome).start()
    crew: Crew[int] = Crew(Scripted(greetings=[{}, {"base": "other"}], deaths={1: 1}), 1, welcome)
    crew.start()
    with pytest.raises(ModelError, match="another base"):
        list(crew.deal([1]))
