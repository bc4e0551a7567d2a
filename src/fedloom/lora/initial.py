"""Where a fresh adapter starts: ``a`` random, ``b`` zero, so that it adds nothing yet; for a sketch the other way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fedloom.errors import AdapterError
from fedloom.lora.algebra import truncate
from fedloom.lora.pair import Adapter, Pair, rank_in
from fedloom.seeding import torch_stream

A_ROW_NORM = math.sqrt(1 / 3)
"""Length of a row of a random A, of variance 1 / (3 · in): see :func:`fresh_adapter`."""


@dataclass(frozen=True)
class Draw:
    """A fresh adapter by the name of its random stream: whoever knows the seed draws it, so only the name crosses.

    Attributes:
        name: of the stream under ``init``.
        rank: drawn at this rank and cut to the first slots of whoever draws; None: at the drawer's own rank.
        random: the factor that is random, the other is zero: ``a`` to train from, ``b`` to sketch a gradient with.
    """

    name: tuple[str | int, ...]
    rank: int | None = None
    random: Literal["a", "b"] = "a"

    @property
    def sketch_rank(self) -> int | None:
        """The rank at which every client sketches, whatever its own; None where it trains."""
        return self.rank if self.random == "b" else None

    def adapter(self, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
        """Return the drawn adapter at ``rank``; see :func:`fresh_adapter` and :func:`sketching_adapter`."""
        draw = fresh_adapter if self.random == "a" else sketching_adapter
        drawn = draw(shapes, rank if self.rank is None else self.rank, seed, *self.name)
        return drawn if self.rank is None else truncate(drawn, rank)


def fresh_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, *name: str | int) -> Adapter:
    """Draw an adapter of zero product: ``a ~ U(−1/√I, 1/√I)``, ``b = 0``, in float32.

    Every module has its own named stream, so the draw depends on neither the order nor the number of modules. One that
    is narrower than the rank has the rank that it can.
    Source: the default of LoRA's and PEFT's releases (Kaiming uniform with a = √5).

    Raises:
        AdapterError: if ``rank`` is below 1.
    """
    if rank < 1:
        raise AdapterError(f"method.ranks: expected at least 1, got {rank}; choose a larger rank")
    pairs = {}
    for module, shape in shapes.items():
        (num_out, num_in), own = shape, rank_in(shape, rank)
        a_RI = torch.empty(own, num_in)
        bound = 1.0 / math.sqrt(num_in)
        a_RI.uniform_(-bound, bound, generator=torch_stream(seed, "init", *name, module))
        pairs[module] = Pair(torch.zeros(num_out, own), a_RI)
    return Adapter(pairs)


def sketching_adapter(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, *name: str | int) -> Adapter:
    """Draw an adapter of zero product whose gradient at ``a`` sketches the weight's: ``b = Ω ~ N(0, 1)``, ``a = 0``.

    With ``y = (W + b a) x`` the gradient of a loss with respect to ``a`` is ``Ωᵀ G``, where ``G`` is that with respect
    to ``W``. No out × in matrix is formed. Streams and narrow modules as in :func:`fresh_adapter`.
    """
    pairs = {}
    for module, shape in shapes.items():
        (num_out, num_in), own = shape, rank_in(shape, rank)
        b_OR = torch.randn(num_out, own, generator=torch_stream(seed, "init", *name, module))
        pairs[module] = Pair(b_OR, torch.zeros(own, num_in))
    return Adapter(pairs)


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Reject a rank that the smallest module cannot hold."""
    module, (num_out, num_in) = min(shapes.items(), key=lambda item: min(item[1]))
    if not 1 <= rank <= min(num_out, num_in):
        raise AdapterError(
            f"method.ranks: expected 1 to {min(num_out, num_in)}, the smaller side of {module} ({num_out} × {num_in}), "
            f"got {rank}; choose a smaller rank or other model.target_modules"
        )
