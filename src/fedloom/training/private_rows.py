"""Training in which no single unit shows: Poisson batches, a gradient per unit, its norm clipped, noise on the sum.

A unit is a row of the client's file, with all that was encoded of it, or all rows that a column names as one's. Its
gradient is that of the mean loss over the learned tokens of all its rows, or of some that each step draws anew; either
way one clip bounds it. In a pass each unit has a slot of its own that holds the client's factors, so a slot's gradient
is that of one unit; how a batch is cut into passes changes no bit of the sum on a CPU. A unit that is too large for a
pass has several, whose gradients gather in its slot before they are clipped: that changes rounding.

Whatever is made of a released gradient (the optimiser's step and moments, what the wire rounds off, what the server
aggregates) costs nothing more: it is post-processing.

Letters: U units of a pass, R rank, I in, O out. Source: Abadi et al. (2016), algorithm 1; Poisson batches as in its
analysis, and the mean is over the batch size that is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.batches import num_batches
from fedloom.data.tokens import TokenSet
from fedloom.lora.layer import LoRAModel
from fedloom.privacy.clipping import add_clipped, add_noise
from fedloom.privacy.draws import Draws
from fedloom.training.slot_factors import factor_names

UNITS_AT_ONCE = 16
"""Units of a pass, each with a slot, unless ``training.micro_batch_size`` says another number."""

Unit = NDArray[np.int64]
"""Positions of the rows of a unit among the client's rows."""


@dataclass(frozen=True)
class RowPrivacy:
    """A unit's gradient has at most the norm ``clip``; the sum gets noise of ``noise_multiplier`` times that.

    Of a unit's rows a step reads at most ``rows_per_unit``; None: all.
    """

    clip: float
    noise_multiplier: float
    rows_per_unit: int | None = None


def sampling_rate(num_units: int, batch_size: int) -> float:
    """Return the probability with which a unit is in a batch, so that ``batch_size`` units are expected."""
    return min(1.0, batch_size / num_units)


def private_steps_of(num_units: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Return how many steps a client of so many units takes in a round."""
    return steps if steps is not None else num_batches(num_units, batch_size, epochs=epochs or 0.0)


def drawn_units(units: Sequence[Unit], batch_size: int, draws: Draws, most: int | None) -> list[Unit]:
    """Return a Poisson batch of units, of each of which at most so many rows are read."""
    batch = [units[index] for index in draws.units(len(units), sampling_rate(len(units), batch_size))]
    if most is None:
        return batch
    return [unit if len(unit) <= most else unit[draws.some(len(unit), most)] for unit in batch]


Share = list[tuple[int, list[int]]]
"""What of a batch is in one pass: units, as positions in the batch, each with positions of its rows in it."""


def shares(
    parts: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    cut: Callable[[Sequence[Sequence[int]], int | None], list[list[int]]],
) -> Iterator[tuple[Share, bool]]:
    """Yield what is in one pass after another, and whether its units end there.

    ``parts`` are the batch's units that share a pass; ``lengths`` and ``targets`` are the tokens of each unit's rows,
    all and those learned. A unit alone in its part may be too large for a pass: ``cut`` then divides its rows among
    several. Those of which nothing is learned are left out, so that the last one is run.
    """
    for part in parts:
        unit = part[0]
        pieces = cut([[length] for length in lengths[unit]], None) if len(part) == 1 else []
        if len(pieces) > 1:
            pieces = [piece for piece in pieces if any(targets[unit][row] for row in piece)]
            yield from (([(unit, piece)], piece is pieces[-1]) for piece in pieces)
        else:
            yield [(unit, list(range(len(lengths[unit])))) for unit in part], True


class UnitSlots:
    """The slots beside a client's own, one for each unit of a pass: copies of its factors, whose gradients are units'.

    The client's slot is the first that is open, all others are its units'.
    """

    def __init__(self, lora: LoRAModel, trained: Collection[str]) -> None:
        names, self._num_slots = factor_names(lora), len(lora.slots)
        wholes = [whole for layer in lora.layers.values() for whole in (layer.a_RI, layer.bt_RO)]
        self._factors = [self._parts(whole.data) for whole in wholes]
        grads = [self._parts(whole.grad) for whole in wholes if whole.grad is not None]
        self._units = [units for _, units in grads]
        self._trained = [grad for name, grad in zip(names, grads, strict=True) if name in trained]
        self._sums = [own[0] for own, _ in self._trained]

    def spread(self) -> None:
        """Copy the client's factors into every unit's slot."""
        for own, units in self._factors:
            units.copy_(own.expand_as(units))

    def gather(self, num_units: int, clip: float) -> None:
        """Add the clipped gradients of the first units to the client's own, and clear them."""
        add_clipped(self._sums, [units[:num_units] for _, units in self._trained], clip)
        for units in self._units:
            units.zero_()

    def release(self, draws: Draws, deviation: float, expected: float) -> None:
        """Add the noise to the client's summed gradient, and divide it by the number of units that is expected."""
        add_noise(self._sums, draws, deviation)
        for whole in self._sums:
            whole.div_(expected)

    def _parts(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Return a factor's first slot (1, R, ...) and the others (U, R, ...), as views."""
        by_slot = whole.view(self._num_slots, -1, whole.shape[-1])
        return by_slot[:1], by_slot[1:]


@dataclass(frozen=True, eq=False)
class PrivateSteps:
    """One client's private steps of a round: which units are drawn, and what is released of their gradients."""

    privacy: RowPrivacy
    units: list[Unit]
    batch_size: int
    draws: Draws
    slots: UnitSlots

    @classmethod
    def of(
        cls,
        lora: LoRAModel,
        rows: TokenSet,
        trained: Collection[str],
        privacy: RowPrivacy,
        batch_size: int,
        draws: Draws,
    ) -> PrivateSteps:
        """Return the steps of a client whose own slot is the first open one, the others being its units'."""
        return cls(privacy, rows.by_unit(), batch_size, draws, UnitSlots(lora, trained))

    @property
    def rate(self) -> float:
        """Probability with which a unit is in a batch."""
        return sampling_rate(len(self.units), self.batch_size)

    def num_steps(self, steps: int | None, epochs: float | None) -> int:
        """Return how many steps a round has."""
        return private_steps_of(len(self.units), self.batch_size, steps, epochs)

    def batches(self) -> Iterator[list[Unit]]:
        """Yield one batch after another, with the unit slots made ready for it; it may be empty."""
        while True:
            self.slots.spread()
            yield drawn_units(self.units, self.batch_size, self.draws, self.privacy.rows_per_unit)

    def gather(self, num_units: int) -> None:
        """Take the gradients of a pass's units."""
        self.slots.gather(num_units, self.privacy.clip)

    def release(self) -> None:
        """Turn the sum of the batch into the gradient that the optimiser sees: the noised sum over what is expected."""
        z = self.privacy.noise_multiplier
        self.slots.release(self.draws, z * self.privacy.clip if z else 0.0, self.rate * len(self.units))
