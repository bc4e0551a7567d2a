"""Passes at once add to a layer in the order of the passes, and none waits for one that is over."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedloom.lora.turns import Turn, Turns


def test_layers_get_the_passes_in_their_order_whichever_is_faster() -> None:
    turns, order, begun = Turns(), dict[int, list[int]](), threading.Barrier(3)

    def run(number: int) -> None:
        with turns.turn(number) as turn:
            for layer in range(5):
                turn.expect(layer)
            begun.wait(10)
            for layer in reversed(range(5)):
                with turn.adding(layer):
                    order.setdefault(layer, []).append(number)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, [2, 1, 0]))
    assert order == {layer: [0, 1, 2] for layer in range(5)}


def test_a_layer_that_is_used_twice_is_given_on_after_the_second_time() -> None:
    turns, order = Turns(), list[str]()
    may_go_on = threading.Event()

    def first() -> None:
        with turns.turn(0) as turn:
            turn.expect(7)
            turn.expect(7)
            with turn.adding(7):
                order.append("first")
            may_go_on.wait(10)
            with turn.adding(7):
                order.append("first again")

    def second() -> None:
        with turns.turn(1) as turn:
            turn.expect(7)
            may_go_on.set()
            with turn.adding(7):
                order.append("second")

    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(first), threads.submit(second)]
        [one.result(10) for one in waiting]
    assert order == ["first", "first again", "second"]


def test_a_pass_may_go_forward_in_one_thread_and_back_in_another() -> None:
    turns, order = Turns(), list[int]()
    passes = [Turn(turns, number) for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda turn: turn.expect(3), passes))

    def back(turn: Turn) -> None:
        with turn.ending(), turn.adding(3):
            order.append(turn.number)

    with ThreadPoolExecutor(2) as threads:
        second, first = threads.submit(back, passes[1]), threads.submit(back, passes[0])
        first.result(10), second.result(10)
    assert order == [0, 1]


def test_a_pass_that_fails_or_uses_other_layers_holds_nobody_up() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="broken"), turns.turn(0):
        raise ValueError("broken")
    with turns.turn(1) as turn:
        turn.expect(1)
        with turn.adding(1):
            pass
    with turns.turn(2) as turn:
        turn.expect(2)
        with turn.adding(2):  # the second pass never used this layer
            pass
