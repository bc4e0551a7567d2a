"""How far the clients of a round agree, module by module, from sums that no number of clients makes larger.

With D_k the change of client k's product from what it trained from, p_k its weight:

    agreement = ‖Σ p_k D_k‖² / Σ p_k ‖D_k‖²
    cosine    = (‖Σ p_k D_k‖² − Σ p_k² ‖D_k‖²) / ((Σ p_k ‖D_k‖)² − Σ p_k² ‖D_k‖²)

The agreement is the share of the clients' work that is left in their mean: 1 where all do the same, 1/K where K of
equal weight have nothing in common, less where they cancel each other. The cosine is the mean over the pairs of
clients, a pair counting p_k p_l ‖D_k‖ ‖D_l‖: 0 where they have nothing in common, whatever their number.

Norms are taken from Gram matrices of the factors; Σ p_k D_k is what the strategy gives as its ideal, less what the
clients trained from. Where gradients cross, or where the server knows no product, D_k is what crosses instead: the
gradient, or the change, of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.lora.algebra import inner_of_pairs
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.client_half import Work
from fedloom.methods.state import Broadcast, Update
from fedloom.methods.strategy import Weighting, weigh
from fedloom.methods.sums import RunningFactors

UNMOVED = 1e-13
"""A square below this share of that of what clients trained from is rounding: they did not move."""


@dataclass(frozen=True)
class Agreement:
    """How far clients agree; None where nothing moved, and of one client there is no cosine.

    Attributes:
        ratio: the agreement.
        cosine: the mean cosine of two clients.
        client_norm: √Σ p_k ‖D_k‖².
    """

    ratio: float | None
    cosine: float | None
    client_norm: float


@dataclass
class Moved:
    """Sums over clients: Σ w ‖D‖, Σ w ‖D‖², Σ w² ‖D‖², and the squared size of what is rounding."""

    norms: float = 0.0
    squares: float = 0.0
    own: float = 0.0
    rounding: float = 0.0

    def add(self, square: float, weight: float, began: float = 0.0) -> None:
        """Take one client in; ``began`` is ‖what it trained from‖²."""
        square = max(square, 0.0)
        self.norms += weight * math.sqrt(square)
        self.squares += weight * square
        self.own += weight * weight * square
        self.rounding += weight * UNMOVED * began

    def agreement(self, total: float, mean_square: float) -> Agreement:
        """Return the agreement, from the sum of the weights and ``‖Σ p_k D_k‖²``."""
        squares, own, norms = self.squares / total, self.own / total**2, self.norms / total
        if squares <= self.rounding / total:
            return Agreement(None, None, math.sqrt(squares))
        between, most = mean_square - own, norms**2 - own
        cosine = max(-1.0, min(1.0, between / most)) if most > 1e-12 * norms**2 else None
        return Agreement(max(0.0, min(1.0, mean_square / squares)), cosine, math.sqrt(squares))


@dataclass
class Agreements:
    """What a round's clients have moved so far, by module and in all; updates pass through on their way to the sum."""

    broadcasts: Sequence[Broadcast]
    work: Work
    weighting: Weighting
    moved: dict[str, Moved] = field(default_factory=dict)
    together: Moved = field(default_factory=Moved)
    total: float = 0.0
    _held: dict[str, Tensor] = field(default_factory=dict)
    _factors: RunningFactors = field(default_factory=lambda: RunningFactors(0))

    @property
    def is_of_products(self) -> bool:
        """Whether the server knows the clients' products; else it is the factors that are compared."""
        return not self.work.is_gradient and not self.work.keeps

    def watched(self, updates: Iterable[Update]) -> Iterator[Update]:
        """Yield the updates as they are, each taken in first; of controls, which send nothing, none is."""
        began = {broadcast.client: broadcast for broadcast in self.broadcasts}
        for update in updates:
            if self.work.sends:
                self._add(update, began[update.client])
            yield update

    def by_module(
        self, ideal: Adapter, start: Adapter | None, ideal_squares: Mapping[str, float]
    ) -> tuple[dict[str, Agreement], Agreement | None]:
        """Return the agreement in every module, and in all together: None where nothing crossed or no mean is known.

        ``ideal`` is the mean product of the clients, ``ideal_squares`` its squared norms, ``start`` what the round
        started from, at the largest rank.
        """
        if not self.moved:
            return {}, None
        if self.is_of_products:
            squares = {name: self._mean_square(pair, name, start, ideal_squares[name]) for name, pair in ideal.items()}
        else:
            squares = {name: _inner_of_factors(pair, pair) for name, pair in self._factors.mean().items()}
        if not squares:
            return {}, None
        found = {name: self.moved[name].agreement(self.total, value) for name, value in squares.items()}
        return found, self.together.agreement(self.total, sum(squares.values()))

    def _add(self, update: Update, broadcast: Broadcast) -> None:
        weight, began = weigh(update, self.weighting), broadcast.trained
        start = began if isinstance(began, Adapter) else Adapter()
        squares = 0.0, 0.0
        changes: dict[str, Pair] = {}
        for name, pair in update.adapter.items():
            before = start.get(name)
            if self.is_of_products:
                square, size = _square_of_change(pair, before)
            else:
                change = changes[name] = pair if self.work.is_gradient else _less(pair, before)
                square, size = _inner_of_factors(change, change), 0.0
            self.moved.setdefault(name, Moved()).add(square, weight, size)
            squares = squares[0] + max(square, 0.0), squares[1] + size
        self.together.add(squares[0], weight, squares[1])
        self.total += weight
        self._factors.add(Adapter(changes), weight)
        if isinstance(broadcast.start, Adapter):
            self._note_held(broadcast.start, weight)

    def _note_held(self, start: Adapter, weight: float) -> None:
        """Add to the weight of those who hold a slot of the start, trained or carried along."""
        for name, pair in start.items():
            held_R = self._held.get(name, torch.zeros(0, dtype=torch.float64))
            held_R = torch.nn.functional.pad(held_R, (0, max(0, pair.rank - len(held_R))))
            held_R[: pair.rank] += weight
            self._held[name] = held_R

    def _mean_square(self, ideal: Pair, name: str, start: Adapter | None, ideal_square: float) -> float:
        """Return ``‖Σ p_k D_k‖²``: of the mean product less the mean of what clients began with, slots of ``start``."""
        held_R = self._held.get(name)
        if start is None or held_R is None:
            return max(ideal_square, 0.0)
        b_OR, a_RI = start[name].b_OR[:, : len(held_R)].double(), start[name].a_RI[: len(held_R)].double()
        began = Pair(b_OR * (held_R / self.total), a_RI)
        return max(ideal_square - 2.0 * inner_of_pairs(ideal, began) + inner_of_pairs(began, began), 0.0)


def _square_of_change(pair: Pair, before: Pair | None) -> tuple[float, float]:
    """Return ``‖b a − b' a'‖²`` and ``‖b' a'‖²``; a fresh draw's product is zero."""
    pair = pair.to(torch.float64)
    if before is None:
        return inner_of_pairs(pair, pair), 0.0
    before = before.to(torch.float64)
    size = inner_of_pairs(before, before)
    return inner_of_pairs(pair, pair) - 2.0 * inner_of_pairs(pair, before) + size, size


def _less(pair: Pair, before: Pair | None) -> Pair:
    """Return the factors less those that training began with."""
    if before is None:
        return pair
    return Pair(pair.b_OR - before.b_OR, pair.a_RI - before.a_RI)


def _inner_of_factors(left: Pair, right: Pair) -> float:
    """Return the inner product of two pairs as vectors of numbers, in float64."""
    return float((left.b_OR.double() * right.b_OR.double()).sum() + (left.a_RI.double() * right.a_RI.double()).sum())
