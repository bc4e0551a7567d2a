"""A method as the table has it: its traits, and how its strategy is made. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedloom.errors import MethodError
from fedloom.methods.options import MethodOptions
from fedloom.methods.traits import Traits

Make = Callable[[Any, MethodOptions], Any]
"""From a ``Cohort`` and the options to a ``Strategy``."""


@dataclass(frozen=True)
class Method:
    """A method: its traits, and what makes its strategy.

    Attributes:
        traits: what the rest of the code knows of it.
        make: takes a ``fedloom.methods.strategy.Cohort`` and :class:`MethodOptions`, returns a ``Strategy``; as a
            callable, or as the text ``package.module:name`` of one, which is imported when a run needs it. None for
            a method without a strategy of its own (a cut model, the untrained base).
        is_local: registered in this process only; engines that leave it need it installed.
    """

    traits: Traits
    make: str | Make | None = None
    is_local: bool = False

    def __post_init__(self) -> None:
        needed = self.traits.runs_rounds
        action = "name it" if needed else "remove it"
        if needed == (self.make is None):
            wanted = "something that makes its strategy" if needed else "nothing that makes a strategy"
            raise MethodError(
                f"method {self.traits.name}: expected {wanted} with kind = {self.traits.kind}, got make = "
                f"{self.make!r}; {action}"
            )
        if isinstance(self.make, str) and not all(part.strip() for part in (*self.make.partition(":"),)):
            raise MethodError(
                f"method {self.traits.name}: expected make as package.module:name, got {self.make!r}; correct it"
            )
