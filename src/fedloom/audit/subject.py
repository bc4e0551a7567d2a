"""What is audited, behind one interface: a subject combines clients' adapters in a scene of invented clients.

All adapters here are *effective*, LoRA's scale in ``b``, and small enough that their products may be formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fedloom.errors import AdapterError
from fedloom.lora.pair import Adapter, Factors, Pair
from fedloom.methods.traits import Law
from fedloom.seeding import torch_stream
from fedloom.wording import one_line

SHAPES: Mapping[str, tuple[int, int]] = {"layers.0.q": (12, 12), "layers.1.v": (8, 12)}
"""One square module, in which a transposed matrix fits, and one whose output is as wide as the largest rank."""
ROWS = (10, 20, 30, 40)

Returned = TypeVar("Returned")
Products = Mapping[str, Tensor]
"""The product of every module, dense, in float64."""


@dataclass(frozen=True)
class Scene:
    """Four clients of given ranks and rows; each has a twin of its rank, ``len(ranks)`` further, for splitting it."""

    title: str
    ranks: tuple[int, ...]
    seed: int = 1

    @property
    def clients(self) -> range:
        """The clients, without their twins."""
        return range(len(self.ranks))

    def rank_of(self, client: int) -> int:
        """Return a client's rank; a twin has that of its client."""
        return self.ranks[client % len(self.ranks)]

    def draw(self, rank: int, *name: str | int) -> Adapter:
        """Return random factors by the name of their stream; numbers that a float32 holds, in float64."""

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=torch_stream(self.seed, *name, *size)).double()

        return Adapter({module: Pair(normal(o, rank), normal(rank, i)) for module, (o, i) in SHAPES.items()})

    def rotation(self, size: int, *name: str | int) -> Tensor:
        """Return a random rotation by the name of its stream."""
        normal = torch.randn(size, size, generator=torch_stream(self.seed, "rotation", *name), dtype=torch.float64)
        turn: Tensor = torch.linalg.qr(normal).Q
        return turn


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one client ended a round with, and the rows it counts for."""

    client: int
    adapter: Adapter
    rows: int


class Trial(Protocol):
    """A subject in one scene, with the clients registered there; a fresh one remembers nothing."""

    @property
    def trains(self) -> Factors:
        """The factors that its clients train."""
        ...

    def before(self) -> Products:
        """Return the global product that the round begins with."""
        ...

    def given(self, client: int) -> Adapter:
        """Return what a client has that was sent its start and changed nothing."""
        ...

    def ended(self, client: int, factors: Adapter) -> Adapter:
        """Return what a client has whose training led to these factors, as far as it trains them.

        Slots that they lack are zero, or as they were where a client carries all of them.
        """
        ...

    def combined(self, round: Sequence[Contribution]) -> Products:
        """Return the global product after a round."""
        ...

    def grouped(self, groups: Sequence[Sequence[Contribution]]) -> Products | str:
        """Return the same with every group combined by itself first, or why there is no such thing."""
        ...

    def caught_up(self) -> float | str:
        """Return how far clients that missed rounds are from the server, relatively, or why nobody can miss any."""
        ...

    def changed(self) -> str:
        """Return which of its inputs it has changed so far; the empty text: none."""
        ...


class Subject(Protocol):
    """What is audited."""

    @property
    def name(self) -> str:
        """What messages and tables call it."""
        ...

    @property
    def claims(self) -> frozenset[Law]:
        """The laws that it promises."""
        ...

    @property
    def needs_one_rank(self) -> bool:
        """Whether it is for clients of equal ranks only."""
        ...

    def exempt(self, law: Law) -> str:
        """Return why a law does not apply; the empty text: it does."""
        ...

    def trial(self, scene: Scene, registered: Mapping[int, int]) -> Trial:
        """Return a fresh trial; ``registered`` are the rows of every client, those that stay away included."""
        ...


def products(adapter: Adapter) -> Products:
    """Return an adapter's products."""
    return {name: pair.to(torch.float64).delta() for name, pair in adapter.items()}


def relative(found: Products, expected: Products, whole: Products | None = None) -> float:
    """Return ``‖found − expected‖ / ‖whole‖`` over all modules; the whole is by default what was expected."""
    distance = math.hypot(*(float((found[name] - expected[name]).norm()) for name in expected))
    size = math.hypot(*(float(product.norm()) for product in (whole or expected).values()))
    return distance / size if size > 0.0 else float(distance > 0.0)


def asked(name: str, call: Callable[[], Returned]) -> Returned:
    """Return what code that is not ours returns.

    Raises:
        AdapterError: it raised something, or wanted to end the process.
    """
    try:
        return call()
    except (Exception, SystemExit) as error:
        reason = one_line(next(iter(str(error).splitlines()), "no reason"))
        raise AdapterError(f"{name} raised {type(error).__name__}: {reason[:200]}; correct it") from error
