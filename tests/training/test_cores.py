"""Work that is spread over threads: in order, and at its end once one piece of it has failed."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from fedloom.lora.turns import Turns
from fedloom.training.cores import in_threads


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(cores: int) -> None:
    together = threading.Barrier(cores)

    def work(item: int) -> tuple[int, int]:
        if item < cores:
            together.wait(10)  # so many are under way at once
        return item * item, torch.get_num_threads()

    expected = [(item * item, torch.get_num_threads()) for item in range(20)]
    assert list(in_threads(work, range(20), cores)) == expected


@pytest.mark.parametrize("cores", [1, 2, 5])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_ends_the_work(failure: type[BaseException], cores: int) -> None:
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 7:
            raise failure(item)
        time.sleep(0.005)

    with pytest.raises(failure, match="7"):
        list(in_threads(work, range(1000), cores))
    assert len(begun) < 500


@pytest.mark.parametrize("cores", [2, 5])
def test_a_caller_that_stops_ends_the_work(cores: int) -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.005)
        return item

    results = in_threads(work, range(1000), cores)
    assert next(results) == 0
    results.close()
    assert len(begun) < 500


def test_passes_that_wait_for_their_turn_end_when_an_earlier_one_fails() -> None:
    """A race: a pass that a thread was given, and that did not run, would hold up the ones behind it for ever."""

    def fail_again_and_again() -> None:
        for _ in range(1000):
            turns = Turns()

            def work(number: int, turns: Turns = turns) -> None:
                with turns.turn(number) as turn:
                    if number == 5:
                        raise ValueError(number)
                    turn.expect(0)
                    with turn.adding(0):
                        pass

            with pytest.raises(ValueError, match="5"):
                list(in_threads(work, range(40), 4))
            ended.append(turns)

    ended: list[Turns] = []
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads are then interrupted in every place
    try:
        everything = threading.Thread(target=fail_again_and_again, daemon=True)
        everything.start()
        everything.join(60)
    finally:
        sys.setswitchinterval(usual)
    assert len(ended) == 1000
