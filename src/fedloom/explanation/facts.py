"""The plain records of an explanation, and the sums over modules that several of its parts need."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedloom.explanation.moments import FactorMoments
from fedloom.lora.algebra import norm_of_difference, norm_of_pair
from fedloom.lora.pair import Adapter, Pair
from fedloom.reporting.spectra import Spectrum, spectra_in

HISTORY = ("change_norm", "aggregation_noise", "agreement", "cosine", "effective_rank")
"""A module's figures that are given for every round."""


@dataclass(frozen=True)
class Shape:
    """What a module's part of the global adapter is made of; of several clients' own adapters the means.

    Attributes:
        rank: as stored.
        numerical_rank, effective_rank, stable_rank: see :class:`fedloom.reporting.spectra.Spectrum`.
        rank_99: directions that hold 99 % of the energy.
        norm: Frobenius norm of the product.
        singular_values: from the largest down; empty of means.
        a_norm, b_norm: norms of the factors that clients go on from, the scale folded into B.
    """

    rank: float
    numerical_rank: float
    effective_rank: float
    stable_rank: float
    rank_99: float
    norm: float
    singular_values: tuple[float, ...]
    a_norm: float
    b_norm: float


@dataclass(frozen=True)
class ModuleFacts:
    """One module in one round; what is not known is None."""

    module: str
    out_in: tuple[int, int] | None
    shape: Shape | None
    change_norm: float | None
    aggregation_noise: float | None
    agreement: float | None
    cosine: float | None
    client_norm: float | None
    moments: Mapping[str, FactorMoments]

    @property
    def effective_rank(self) -> float | None:
        """The effective rank, where the spectrum is known."""
        return None if self.shape is None else self.shape.effective_rank


@dataclass(frozen=True)
class RoundFacts:
    """One round over the modules that were asked for; ``effective_rank`` and ``rank`` are means over them."""

    round: int
    loss_nats: float | None
    rank: float | None
    effective_rank: float | None
    change_norm: float | None
    aggregation_noise: float | None
    agreement: float | None
    cosine: float | None


@dataclass(frozen=True)
class ScaleFacts:
    """The clients of one rank and scale in a round, and the mean norm of their changes."""

    rank: int
    alpha: float
    scale: float
    num_clients: int
    client_norm: float | None


def shapes_of(adapters: Collection[Adapter], going_on: Adapter) -> dict[str, tuple[tuple[int, int], Shape]]:
    """Return (out, in) and shape of every module of one adapter, or the means over several.

    ``going_on`` are the factors whose norms are given, of modules that it has.
    """
    every = [{one.module: one for one in spectra_in(adapter)} for adapter in adapters]
    found = {}
    for name in every[0] if every else ():
        spectra = [own[name] for own in every]
        factors = [going_on[name]] if name in going_on else [adapter[name] for adapter in adapters]
        found[name] = spectra[0].shape, _shape(spectra, factors)
    return found


def _shape(spectra: Sequence[Spectrum], factors: Sequence[Pair]) -> Shape:
    def mean(figure: Callable[[Spectrum], float]) -> float:
        return fmean(figure(one) for one in spectra)

    return Shape(
        rank=mean(lambda one: one.rank),
        numerical_rank=mean(lambda one: one.numerical_rank),
        effective_rank=mean(lambda one: one.effective_rank),
        stable_rank=mean(lambda one: one.stable_rank),
        rank_99=mean(lambda one: one.rank_holding(0.99) if one.norm > 0.0 else 0),
        norm=mean(lambda one: one.norm),
        singular_values=spectra[0].singular_values if len(spectra) == 1 else (),
        a_norm=fmean(float(pair.a_RI.double().norm()) for pair in factors),
        b_norm=fmean(float(pair.b_OR.double().norm()) for pair in factors),
    )


def changes_between(after: Adapter, before: Adapter) -> dict[str, float]:
    """Return by module the norm of the difference of two global adapters."""
    return {
        name: norm_of_difference(pair, before[name]) if name in before else norm_of_pair(pair)
        for name, pair in after.items()
    }


def round_facts(record: Mapping[str, Any], modules: Sequence[ModuleFacts], *, is_whole: bool) -> RoundFacts:
    """Return a round's line: over all modules what its record says, over some of them what these add up to."""
    shapes = [one.shape for one in modules if one.shape is not None]
    held = [one for one in modules if one.client_norm is not None]
    work = sum((one.client_norm or 0.0) ** 2 for one in held)
    noises = [one.aggregation_noise for one in modules if one.aggregation_noise is not None]
    cosines = [one.cosine for one in modules if one.cosine is not None]
    changes = [one.change_norm for one in modules if one.change_norm is not None]
    kept = sum((one.agreement or 0.0) * (one.client_norm or 0.0) ** 2 for one in held)
    loss = (record.get("eval") or {}).get("loss_nats")
    return RoundFacts(
        round=record["round"],
        loss_nats=loss,
        rank=fmean(one.rank for one in shapes) if shapes else None,
        effective_rank=fmean(one.effective_rank for one in shapes) if shapes else None,
        change_norm=math.hypot(*changes) if changes else record.get("change_norm"),
        aggregation_noise=record.get("aggregation_noise") if is_whole else fmean(noises) if noises else None,
        agreement=record.get("agreement") if is_whole else kept / work if work > 0.0 else None,
        cosine=record.get("cosine") if is_whole else fmean(cosines) if cosines else None,
    )


def history_of(rounds: Sequence[Sequence[ModuleFacts]]) -> dict[str, dict[str, tuple[float | None, ...]]]:
    """Return by module, then by figure, its values in the rounds; of figures that any of them has."""
    found: dict[str, dict[str, tuple[float | None, ...]]] = {}
    by_name = [{one.module: one for one in modules} for modules in rounds]
    for name in dict.fromkeys(name for modules in by_name for name in modules):
        ones = [modules.get(name) for modules in by_name]
        for key in HISTORY:
            values = tuple(None if one is None else getattr(one, key) for one in ones)
            if any(value is not None for value in values):
                found.setdefault(name, {})[key] = values
    return found
