"""Passes at once over one base: each adds its gradients to a layer once all passes before it have.

Sums of floating-point numbers depend on their order, so the order is that of the passes, whichever thread is faster:
the gradients have the same bits for any number of threads. Backward goes from the last layer to the first in every
pass, so a pass waits for the one before it by a layer or two, and never for one behind it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Turns:
    """The order of the passes that are under way: how many of them a layer has had, and which are over."""

    _changed: threading.Condition = field(default_factory=threading.Condition)
    _had: dict[int, set[int]] = field(default_factory=dict)
    _over: set[int] = field(default_factory=set)

    @contextmanager
    def turn(self, number: int) -> Iterator[Turn]:
        """Yield the turn of a pass, counted from 0, that ends here."""
        turn = Turn(self, number)
        with turn.ending():
            yield turn

    def over(self, number: int) -> None:
        """Say that a pass has ended, for better or worse: nobody waits for it."""
        with self._changed:
            self._over.add(number)
            self._changed.notify_all()

    def wait(self, layer: int, number: int) -> None:
        """Wait until every earlier pass has added to a layer, or is over."""
        with self._changed:
            had = self._had.setdefault(layer, set())
            self._changed.wait_for(lambda: all(n in had or n in self._over for n in range(number)))

    def done(self, layer: int, number: int) -> None:
        """Say that a pass has added to a layer all that it will."""
        with self._changed:
            self._had.setdefault(layer, set()).add(number)
            self._changed.notify_all()


@dataclass(eq=False)
class Turn:
    """One pass's turn. A layer that is used more than once in a pass is done with the last of its backwards."""

    turns: Turns
    number: int
    _left: Counter[int] = field(default_factory=Counter)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Run the last of a pass, which may have begun in another thread."""
        try:
            yield
        finally:
            self.turns.over(self.number)

    def expect(self, layer: int) -> None:
        """Count a forward through a layer, which will have a backward."""
        self._left[layer] += 1

    @contextmanager
    def adding(self, layer: int) -> Iterator[None]:
        """Wait for the layer's turn, and give it on behind the last backward."""
        self.turns.wait(layer, self.number)
        yield
        self._left[layer] -= 1
        if self._left[layer] == 0:
            self.turns.done(layer, self.number)
