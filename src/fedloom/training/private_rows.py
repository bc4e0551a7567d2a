"""Training in which no single row shows: Poisson batches, a gradient per unit, its norm clipped, noise on the sum.

A unit is a row of the client's file, with all that was encoded of it. In a pass each unit has a slot of its own that
holds the client's factors, so a slot's gradient is that of one unit; how a batch is cut into passes changes no bit of
the sum on a CPU. Whatever is made of a released gradient (the optimiser's step and moments, what the wire rounds off,
what the server aggregates) costs nothing more: it is post-processing.

Letters: U units of a pass, R rank, I in, O out. Source: Abadi et al. (2016), algorithm 1; Poisson batches as in its
analysis, and the mean is over the batch size that is expected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
    """A unit's gradient has at most the norm ``clip``; the sum gets noise of ``noise_multiplier`` times that."""

    clip: float
    noise_multiplier: float


def sampling_rate(num_units: int, batch_size: int) -> float:
    """Return the probability with which a unit is in a batch, so that ``batch_size`` units are expected."""
    return min(1.0, batch_size / num_units)


def private_steps_of(num_units: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Return how many steps a client of so many units takes in a round."""
    return steps if steps is not None else num_batches(num_units, batch_size, epochs=epochs or 0.0)


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
            yield [self.units[index] for index in self.draws.units(len(self.units), self.rate)]

    def gather(self, num_units: int) -> None:
        """Take the gradients of a pass's units."""
        self.slots.gather(num_units, self.privacy.clip)

    def release(self) -> None:
        """Turn the sum of the batch into the gradient that the optimiser sees: the noised sum over what is expected."""
        z = self.privacy.noise_multiplier
        self.slots.release(self.draws, z * self.privacy.clip if z else 0.0, self.rate * len(self.units))
