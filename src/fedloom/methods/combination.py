"""Combine adapters in one call, for a notebook: the rule of a method on adapters that are at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, assert_never

from fedloom.errors import AdapterError
from fedloom.lora.algebra import mean_factors, pad, stack
from fedloom.lora.pair import Adapter, check_finite

Rule = Literal["fedit", "zero-padding", "flora"]
RULES: tuple[Rule, ...] = ("fedit", "zero-padding", "flora")


def aggregate(adapters: Sequence[Adapter], weights: Sequence[float] | None = None, method: Rule = "flora") -> Adapter:
    """Return what a server makes of its clients' adapters.

    ``flora`` stacks: its product is ``Σ p_k B_k A_k`` exactly, at rank ``Σ r_k`` (``compress`` lowers it).
    ``fedit`` takes the means of the factors, whose product is another, and needs one rank. ``zero-padding`` does the
    same after padding to the largest rank. Weights are divided by their sum; left out, they are equal.

    >>> import torch
    >>> from fedloom import Adapter, Pair
    >>> one = Adapter({"layer": Pair(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))})
    >>> two = Adapter({"layer": Pair(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 1.0]]))})
    >>> aggregate([one, two])["layer"].delta().tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    >>> aggregate([one, two], method="fedit")["layer"].delta().tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    >>> aggregate([one, two], weights=[3, 1]).ranks
    {'layer': 2}

    Raises:
        AdapterError: there is no adapter, one is empty or not finite, they differ in modules or shapes, weights do
            not fit, or ``fedit`` is given different ranks.

    Source: FedIT (arXiv 2305.05644), section 3.2; FLoRA (arXiv 2409.05976), section 3.2; HetLoRA (arXiv 2401.06432).
    """
    shares = _shares(len(adapters), weights)
    for position, adapter in enumerate(adapters):
        if not adapter:
            raise AdapterError(
                f"adapters[{position}]: expected at least one module, got an empty adapter; leave it out"
            )
        check_finite(adapter, f"adapters[{position}]", "leave that adapter out")
    match method:
        case "flora":
            return stack(adapters, shares)
        case "zero-padding":
            rank = max(rank for adapter in adapters for rank in adapter.ranks.values())
            return mean_factors([pad(adapter, rank) for adapter in adapters], shares)
        case "fedit":
            _refuse_ranks(adapters)
            return mean_factors(adapters, shares)
        case _ if method not in RULES:
            raise AdapterError(f"method: expected one of {', '.join(RULES)}, got {method!r}")
        case _:
            assert_never(method)


def _shares(num_adapters: int, weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * num_adapters if weights is None else list(weights)
    try:
        total = math.fsum(given)
    except (OverflowError, TypeError):  # more than a float holds, or no numbers
        total = math.inf
    if not given or len(given) != num_adapters or not 0.0 < total < math.inf or min(given) < 0.0:
        raise AdapterError(
            f"expected at least one adapter, and weights ≥ 0 with a finite sum above 0, one for each; "
            f"got {num_adapters} adapters and weights {given}"
        )
    return [weight / total for weight in given]


def _refuse_ranks(adapters: Sequence[Adapter]) -> None:
    for name, rank in adapters[0].ranks.items():
        differing = next((a.ranks[name] for a in adapters if a.ranks.get(name, rank) != rank), None)
        if differing is not None:
            raise AdapterError(
                f"fedit: expected one rank for all adapters, got {rank} and {differing} at {name}; "
                "use zero-padding or flora"
            )
