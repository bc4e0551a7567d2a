"""What a sheet says of masked sums: how large they are, who stays, and what hides a whole site in one."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

from fedloom.assembly.round_plan import is_sketch_whole, sketch_rank_of
from fedloom.config import Settings
from fedloom.federation.sum_terms import FEWEST_MEMBERS, threshold_of
from fedloom.methods.options import ClientPrivacy
from fedloom.sites.frame_parts import Part


class SheetSum(Part):
    """How updates are summed under masks: what all send as many numbers as, and how many stay in a sum at least.

    ``clip`` is given where the study hides whole sites: each clips its own change, to this norm; ``noise_multiplier``
    where each adds a share of the noise, of which those of ``fewest`` sites make up the whole; ``sketch_rank`` where
    products are summed, which sketches give exactly up to that rank.
    """

    max_rank: Annotated[int, Ge(1), Le(1 << 20)]
    fewest: Annotated[int, Ge(FEWEST_MEMBERS), Le(4096)]
    clip: Annotated[float, Gt(0), Le(1e9)] | None = None
    noise_multiplier: Annotated[float, Gt(0), Le(1e9)] | None = None
    sketch_rank: Annotated[int, Ge(1), Le(10**9)] | None = None
    sketch_is_whole: bool = True


def client_privacy_of(terms: SheetSum | None) -> ClientPrivacy | None:
    """Return how a site hides itself in a sum; what the sum is divided by stays at the server."""
    if terms is None or terms.clip is None:
        return None
    z = terms.noise_multiplier
    return ClientPrivacy(terms.clip, z or 0.0, 1.0, draws="system", shares=None if z is None else terms.fewest)


def sum_of(settings: Settings, cohort_size: int) -> SheetSum | None:
    """Return what a site is told of sums of which so many are drawn; None where they are not masked."""
    privacy = settings.privacy
    if privacy.sum == "plain":
        return None
    fewest = threshold_of(privacy.threshold, cohort_size)
    clip = privacy.clip if privacy.unit == "client" else None
    noise = privacy.noise_multiplier if privacy.noise == "clients" else None
    return SheetSum(
        max_rank=max(settings.client_ranks),
        fewest=fewest,
        clip=clip,
        noise_multiplier=noise,
        sketch_rank=sketch_rank_of(settings),
        sketch_is_whole=is_sketch_whole(settings),
    )
