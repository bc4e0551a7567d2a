"""A method's client half: what a client trains in a round, what of it crosses the wire, and what the client keeps.

``a`` and ``b`` are the two factors of every pair (see ``lora/pair.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from fedloom.lora.pair import BOTH, Factors


class Payload(StrEnum):
    """What a client sends of the factors that cross."""

    FACTORS = "factors"
    """The factors as training left them."""
    CHANGE = "change"
    """The factors as training left them, less those it started from."""
    GRADIENT = "gradient"
    """The gradient of the mean loss of one batch at the start; the optimiser takes no step."""
    SKETCH = "sketch"
    """A gradient of a few rows at a start with a drawn B and A zero: Ωᵀ times the gradient of the weights."""


class Moments(StrEnum):
    """Where the optimiser's moments of a round come from."""

    FRESH = "fresh"
    """Zero at the start of every round, as FedIT's and FLoRA's clients do it."""
    OWN = "own"
    """The client continues with those of its last round."""
    SHARED = "shared"
    """The client starts from what the clients of the rounds before it found, as from a few steps (training.moments)."""


class Rounding(StrEnum):
    """What becomes of what the wire's dtype rounds off an update."""

    DROPPED = "dropped"
    OWED = "owed"
    """The client keeps it and adds it to its next update (error feedback). For changes and gradients only."""


@dataclass(frozen=True)
class Work:
    """One client's part of one round.

    Attributes:
        trains: factors that the optimiser moves; the others stay as the client received them.
        sends: factors that cross to the server; empty where nothing is shared.
        payload: what is sent of them.
        keeps: factors that stay the client's own: it continues from its own instead of from the server's.
        moments: where the optimiser's moments come from.
        prior_steps: steps that shared moments count for.
        rounding: what becomes of what the wire rounds off.
        corrects: whether control variates correct the steps.

    Raises:
        ValueError: if a factor is sent that is not trained, or kept and sent, or rounding is owed on whole factors.
    """

    trains: Factors = BOTH
    sends: Factors = BOTH
    payload: Payload = Payload.FACTORS
    keeps: Factors = field(default_factory=frozenset)
    moments: Moments = Moments.FRESH
    prior_steps: int = 0
    rounding: Rounding = Rounding.DROPPED
    corrects: bool = False

    @property
    def is_gradient(self) -> bool:
        """Whether a gradient is measured, and no step is taken."""
        return self.payload in (Payload.GRADIENT, Payload.SKETCH)

    def __post_init__(self) -> None:
        if not (self.trains and self.trains <= BOTH and self.sends <= self.trains and self.keeps <= BOTH):
            raise ValueError(
                f"expected factors a and b, and to send only what is trained; got trains {sorted(self.trains)}, sends "
                f"{sorted(self.sends)}, keeps {sorted(self.keeps)}; change the client half's work"
            )
        if self.keeps & self.sends:
            raise ValueError(f"expected a factor to be kept or sent, got both for {sorted(self.keeps & self.sends)}")
        if self.rounding is Rounding.OWED and self.payload is Payload.FACTORS:
            raise ValueError(
                "expected rounding to be owed on a change or a gradient, got whole factors; send the change"
            )


SKETCH = Work(trains=frozenset("a"), sends=frozenset("a"), payload=Payload.SKETCH)
"""Measure a sketch and send it; keep nothing."""


class ClientHalf(Protocol):
    """What a method's clients do, round by round; known to client and server alike."""

    def work(self, round: int) -> Work:
        """Return a client's part of a round; rounds count from 1."""
        ...


@dataclass(frozen=True)
class MeasuresGradient:
    """A client half that reads one batch and sends the gradient of what the method's clients train."""

    half: ClientHalf

    def work(self, round: int) -> Work:
        """Return a client's part of a round."""
        work = self.half.work(round)
        return replace(work, sends=work.trains, payload=Payload.GRADIENT)


@dataclass(frozen=True)
class WithMoments:
    """A client half whose optimiser's moments come from elsewhere than the method says."""

    half: ClientHalf
    moments: Moments
    prior_steps: int

    def work(self, round: int) -> Work:
        """Return a client's part of a round."""
        return replace(self.half.work(round), moments=self.moments, prior_steps=self.prior_steps)


@dataclass(frozen=True)
class WithControl:
    """A client half whose steps are corrected by control variates."""

    half: ClientHalf

    def work(self, round: int) -> Work:
        """Return a client's part of a round."""
        return replace(self.half.work(round), corrects=True)


@dataclass(frozen=True)
class InFewBits:
    """A client half whose updates cross as codes of few bits: of factors their change, so that little is rounded.

    Where ``owes``, a client adds what was rounded off to its next update, so that nothing is lost over the rounds. It
    makes no sense where every round begins with fresh factors.
    """

    half: ClientHalf
    owes: bool

    def work(self, round: int) -> Work:
        """Return a client's part of a round."""
        work = self.half.work(round)
        payload = Payload.CHANGE if work.payload is Payload.FACTORS else work.payload
        return replace(work, payload=payload, rounding=Rounding.OWED if self.owes else Rounding.DROPPED)


@dataclass(frozen=True)
class SketchesFirst:
    """A client half that sketches the gradient of the weights in round 1; from round 2 on it is the method's.

    The method's own rounds count from 1 there.
    """

    half: ClientHalf

    def work(self, round: int) -> Work:
        """Return a client's part of a round."""
        return SKETCH if round == 1 else self.half.work(round - 1)


@dataclass(frozen=True)
class EveryRound:
    """The same work in every round; by default train both factors and send them."""

    every: Work = field(default_factory=Work)

    def work(self, round: int) -> Work:
        """Return the one work."""
        return self.every
