"""The methods that fedloom ships, in the order of tables within a kind. Imports no torch."""

from __future__ import annotations

from typing import Any

from fedloom.methods.method import Method
from fedloom.methods.traits import Kind, Law, Traits

MAKERS = "fedloom.methods.makers"
_NOISY, _FADING = (Law.EXACTNESS, Law.RESCALING), (Law.NO_OP_RANKS,)
_ONE_FACTOR: dict[str, Any] = {"aggregates_split": False, "combines": False, "unclaimed": _FADING}
_PERSONAL: dict[str, Any] = {**dict.fromkeys(("is_personal", "needs_one_rank"), True), **_ONE_FACTOR, "unclaimed": ()}
SHIPPED: dict[str, Method] = {
    one.traits.name: one
    for one in (
        Method(
            Traits(
                "fedit",
                "the mean of the factors, at one rank",
                needs_one_rank=True,
                averages_factors=True,
                is_standard=True,
                unclaimed=_NOISY,
            ),
            f"{MAKERS}:fedit",
        ),
        Method(
            Traits(
                "zero-padding",
                "the mean of the factors, padded with zeros to the largest rank",
                weightings=("rows", "tokens", "uniform", "work", "norm"),
                averages_factors=True,
                is_standard=True,
                unclaimed=(*_NOISY, *_FADING),
            ),
            f"{MAKERS}:zero_padding",
        ),
        Method(
            Traits(
                "flora",
                "fresh adapters every round, stacked: the exact mean of the products",
                starts_fresh=True,
                grows_side=True,
                stacks_products=True,
                is_standard=True,
            ),
            f"{MAKERS}:flora",
        ),
        Method(
            Traits(
                "fedex-lora",
                "the mean of the factors, at one rank, and what it misses in the side: the exact mean of the products",
                needs_one_rank=True,
                grows_side=True,
            ),
            f"{MAKERS}:fedex_lora",
        ),
        Method(
            Traits(
                "weave",
                "the whole adapter at every client, its first slots trained, few bits: the exact mean at any ranks",
                grows_side=True,
                averages_factors=True,
                combines=False,
                defaults={
                    "method.broadcast": "compressed",
                    "method.tolerance": 0.02,
                    "method.broadcast_max_bytes": 0.25,
                    "server.step": "adamw",
                    "wire.dtype": "int4",
                },
            ),
            f"{MAKERS}:weave",
        ),
        Method(
            Traits(
                "carry",
                "the whole adapter at every client, its strongest directions trained: the exact mean at any ranks",
                grows_side=True,
                turns_slots=True,
                combines=False,
                defaults={
                    "method.broadcast": "compressed",
                    "method.tolerance": 0.02,
                    "method.broadcast_max_bytes": 0.25,
                },
            ),
            f"{MAKERS}:carry",
        ),
        Method(
            Traits(
                "flexlora",
                "the best approximation of the exact mean at the largest rank",
                unclaimed=(Law.EXACTNESS, *_FADING),
            ),
            f"{MAKERS}:flexlora",
        ),
        Method(
            Traits(
                "ffa-lora",
                "one shared and frozen A, the mean of B",
                averages_factors=True,
                freezes_a=True,
                **_ONE_FACTOR,
            ),
            f"{MAKERS}:ffa_lora",
        ),
        Method(
            Traits("rolora", "B and A trained by turns, the mean of either", **_ONE_FACTOR),
            f"{MAKERS}:rolora",
        ),
        Method(
            Traits("fedsa-lora", "the mean of A, at one rank; each client keeps a B of its own", **_PERSONAL),
            f"{MAKERS}:fedsa_lora",
        ),
        Method(
            Traits(
                "splitlora",
                "the model cut between clients and server, the clients' half aggregated",
                kind=Kind.SPLIT,
                aggregates_split=False,
                combines=False,
                is_standard=True,
            )
        ),
        Method(
            Traits(
                "centralised",
                "all rows in one place",
                kind=Kind.CONTROL,
                weightings=(),
                needs_one_rank=True,
                aggregates_split=False,
                combines=False,
                pools_rows=True,
                is_standard=True,
            ),
            f"{MAKERS}:centralised",
        ),
        Method(
            Traits(
                "standalone",
                "every client for itself",
                kind=Kind.CONTROL,
                weightings=(),
                aggregates_split=False,
                combines=False,
                is_standard=True,
            ),
            f"{MAKERS}:standalone",
        ),
        Method(
            Traits(
                "base",
                "the base as it is, untrained",
                kind=Kind.UNTRAINED,
                weightings=(),
                aggregates_split=False,
                combines=False,
                is_standard=True,
            )
        ),
    )
}
