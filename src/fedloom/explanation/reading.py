"""An explanation in words. What is said where is decided by the thresholds below; docs/explain.md has the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedloom.explanation.facts import ModuleFacts
from fedloom.wording import counted

if TYPE_CHECKING:
    from fedloom.explanation.explain import Explanation

CANCELLING = -0.05
"""Clients of a mean cosine below this cancel each other."""
UNRELATED = 0.1
"""Below this they have next to nothing in common."""
AGREEING = 0.5
"""From this on they agree; between the two they share a part."""
UNUSED = 0.5
"""A rank of which the effective rank is less than this share is called little used."""
EXACT = 1e-4
"""Noise below this is rounding."""
NOISY = 0.1
"""Noise above this is a mean that is not the clients'."""
UNEVEN = 2.0
"""Clients of one rank that move the product this many times as far as those of another are named."""
SHORT = 0.3
"""A step below this share of the learning rate comes of gradients that are mostly noise."""


def reading(found: Explanation) -> list[str]:
    """Return what the figures mean, a sentence a line."""
    return [
        *_agreement(found),
        *_pairs(found),
        *_ranks(found),
        *_noise(found),
        *_change(found),
        *_scales(found),
        *_moments(found),
    ]


def _agreement(found: Explanation) -> Iterator[str]:
    line = next(one for one in found.rounds if one.round == found.round)
    known = [one for one in found.modules if one.cosine is not None]
    if not known:
        return
    cosine = line.cosine if line.cosine is not None else sum(one.cosine or 0.0 for one in known) / len(known)
    yield f"clients {_verdict(cosine)}: mean cosine {cosine:.2f} ({found.compared})"
    if line.agreement is not None and found.chance is not None:
        yield f"the mean keeps {line.agreement:.0%} of their work; of unrelated ones about {found.chance:.0%}"
    cancelling = sorted((one for one in known if _of(one.cosine) < CANCELLING), key=lambda one: _of(one.cosine))
    if cancelling and len(known) > 1:
        more = f", and in {len(cancelling) - 1} more" if len(cancelling) > 1 else ""
        yield f"clients cancel each other most in {cancelling[0].module}: cosine {_of(cancelling[0].cosine):.2f}{more}"
    if len(known) > 1:
        best = max(known, key=lambda one: _of(one.cosine))
        yield f"they agree most in {best.module}: cosine {_of(best.cosine):.2f}"


def _verdict(cosine: float) -> str:
    if cosine < CANCELLING:
        return "cancel each other"
    if cosine < UNRELATED:
        return "have next to nothing in common"
    return "share a part of what they learn" if cosine < AGREEING else "agree"


def _pairs(found: Explanation) -> Iterator[str]:
    extremes = None if found.pairs is None else found.pairs.extremes
    if extremes is not None:
        (one, other, least), (this, that, most) = extremes
        yield f"of two clients {one} and {other} agree least (cosine {least:.2f}), {this} and {that} most ({most:.2f})"


def _ranks(found: Explanation) -> Iterator[str]:
    shaped = [one for one in found.modules if one.shape is not None and one.shape.norm > 0.0]
    if not shaped:
        return
    used, stored, held = (_mean(shaped, key) for key in (_effective, _stored, _rank_99))
    nominal = f"rank {found.nominal_rank}"
    carried = nominal if stored <= found.nominal_rank else f"{nominal}, carried as {stored:.0f} in all,"
    little = " (little of it)" if used < UNUSED * min(stored, found.nominal_rank) else ""
    yield f"{carried} is used as {used:.1f}{little}: {held:.0f} directions hold 99 % of the energy, on average"
    if len(shaped) > 1:
        least, most = min(shaped, key=_effective), max(shaped, key=_effective)
        yield (
            f"least of it is used in {least.module} ({_effective(least):.1f}), most in {most.module} "
            f"({_effective(most):.1f})"
        )


def _noise(found: Explanation) -> Iterator[str]:
    noisy = [one for one in found.modules if one.aggregation_noise is not None]
    if not noisy:
        return
    most = max(noisy, key=lambda one: _of(one.aggregation_noise))
    worst = _of(most.aggregation_noise)
    if worst < EXACT:
        yield "the aggregation is exact: what was applied is the clients' mean"
    elif worst < NOISY:
        yield f"the aggregation is nearly exact: it misses {worst:.1%} of the clients' mean at most, in {most.module}"
    else:
        yield f"the aggregation is noisy: it misses {worst:.0%} of the clients' mean in {most.module}"
        yield "a method that keeps the law of exactness misses none: see `fedloom audit`"


def _change(found: Explanation) -> Iterator[str]:
    changed = [one for one in found.modules if one.change_norm]
    whole = sum(_of(one.change_norm) ** 2 for one in changed)
    if len(changed) > 1 and whole > 0.0:
        most = max(changed, key=lambda one: _of(one.change_norm))
        share = _of(most.change_norm) ** 2 / whole
        of = counted(len(changed), "module")
        yield f"round {found.round} changed {most.module} most: {share:.0%} of the energy of {of}"


def _scales(found: Explanation) -> Iterator[str]:
    moved = [one for one in found.scales if one.client_norm]
    if len(moved) < 2:
        return
    most, least = max(moved, key=lambda one: _of(one.client_norm)), min(moved, key=lambda one: _of(one.client_norm))
    ratio = _of(most.client_norm) / _of(least.client_norm)
    far, near = (f"rank {one.rank} (scale {one.scale:.3g})" for one in (most, least))
    yield f"clients of {far} move {ratio:.1f} times as far as those of {near}"
    if ratio > UNEVEN:
        yield "method.alpha by client, or method.scaling, changes that"


def _moments(found: Explanation) -> Iterator[str]:
    steps = [one.step for module in found.modules for one in module.moments.values() if one.step is not None]
    if not steps:
        return
    mean = sum(steps) / len(steps)
    yield f"moments ({found.moments}) imply steps of {mean:.2f} learning rates; AdamW's first from nothing are 1"
    if mean < SHORT:
        yield "so most of a gradient is noise that the moments average away"


def _of(value: float | None) -> float:
    return 0.0 if value is None else value


def _mean(modules: Sequence[ModuleFacts], key: Callable[[ModuleFacts], float]) -> float:
    return sum(map(key, modules)) / len(modules)


def _effective(one: ModuleFacts) -> float:
    return one.shape.effective_rank if one.shape is not None else 0.0


def _stored(one: ModuleFacts) -> float:
    return one.shape.rank if one.shape is not None else 0.0


def _rank_99(one: ModuleFacts) -> float:
    return one.shape.rank_99 if one.shape is not None else 0.0
