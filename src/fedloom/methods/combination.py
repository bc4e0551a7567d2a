"""Combine adapters in one call, for a notebook: a method's own strategy on adapters that are at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from fedloom.errors import AdapterError
from fedloom.lora.algebra import check_alike
from fedloom.lora.pair import Adapter, Pair, check_finite
from fedloom.methods import table
from fedloom.methods.state import ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.training.stats import TrainingStats
from fedloom.wording import counted, either


def aggregate(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, method: str = table.EXACT
) -> Adapter:
    """Return what a server makes of its clients' adapters, by the strategy that a run uses.

    ``flora`` stacks: its product is ``Σ p_k B_k A_k`` exactly, at rank ``Σ r_k`` (``compress`` lowers it).
    ``fedit`` takes the means of the factors, whose product is another, and needs one rank. ``zero-padding`` does the
    same after padding to the largest rank. Any method of the table whose traits say ``combines`` can be named, one of
    your own too. Weights are divided by their sum; by default they are equal.

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
            not fit, the method cannot combine adapters, or it needs one rank and is given several.

    Source: FedIT (arXiv 2305.05644), section 3.2; FLoRA (arXiv 2409.05976), section 3.2; HetLoRA (arXiv 2401.06432).
    """
    shares = shares_of(len(adapters), weights)
    if not table.has(method, "combines"):
        known = table.names("combines")
        raise AdapterError(f"method: expected one of {', '.join(known)}, got {method!r}; {table.remedy(method, known)}")
    for position, adapter in enumerate(adapters):
        if not adapter:
            raise AdapterError(f"adapters[{position}]: expected at least one module, got an empty adapter; drop it")
        check_finite(adapter, f"adapters[{position}]", "leave that adapter out")
    check_alike(adapters)
    if table.traits_of(method).needs_one_rank:
        _refuse_ranks(adapters, method)
    pairs: dict[str, Pair] = {}
    for modules in _cohorts(adapters):
        cohort = [Adapter({name: adapter[name] for name in modules}) for adapter in adapters]
        pairs |= _applied(cohort, shares, method)
    return Adapter({name: pairs[name] for name in adapters[0]})


def _cohorts(adapters: Sequence[Adapter]) -> list[list[str]]:
    """Group modules so that within a group an adapter has one rank and one dtype, as a strategy expects of a client."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in adapters[0]:
        key = tuple((adapter[name].rank, adapter[name].b_OR.dtype) for adapter in adapters)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _applied(adapters: Sequence[Adapter], shares: Sequence[float], method: str) -> Adapter:
    """Feed a strategy one update an adapter, as a server's first round does, and return what it put in their place.

    A server adds up on the CPU, in the one dtype that all updates have; the result goes back to where they lie.
    """
    pairs = [next(iter(adapter.values())) for adapter in adapters]
    dtype = reduce(torch.promote_types, [pair.b_OR.dtype for pair in pairs])
    adapters = [adapter.to(dtype).to("cpu") for adapter in adapters]
    ranks = [max(adapter.ranks.values()) for adapter in adapters]
    cohort = Cohort(adapters[0].shapes, max(ranks), ranks.__getitem__, seed=0)
    strategy: Strategy = table.make(method, cohort)
    # The clients are taken to have started from nothing: what is applied is a matter of where they ended.
    fresh = table.traits_of(method).starts_fresh
    state = ServerState() if fresh else ServerState(start=_nothing(adapters[0], max(ranks)))
    updates = [
        _update(client, adapter, share) for client, (adapter, share) in enumerate(zip(adapters, shares, strict=True))
    ]
    return strategy.aggregate(state, updates).applied.to(pairs[0].b_OR.device)


def _update(client: int, adapter: Adapter, share: float) -> Update:
    """Return a client's update that weighs its share."""
    return Update(1, client, adapter, TrainingStats(1), weight=share)


def _nothing(like: Adapter, rank: int) -> Adapter:
    """Return zeros in the shapes and dtype of an adapter."""

    def zeros(pair: Pair) -> Pair:
        (num_out, num_in), make = pair.shape, pair.b_OR.new_zeros
        return Pair(make(num_out, rank), make(rank, num_in))

    return Adapter({name: zeros(pair) for name, pair in like.items()})


def shares_of(num_adapters: int, weights: Sequence[float] | None) -> list[float]:
    """Return the weights divided by their sum, equal ones where none are given.

    Raises:
        AdapterError: there is not one weight ≥ 0 for each adapter.
    """
    given = [1.0] * num_adapters if weights is None else list(weights)
    try:
        total = math.fsum(given)
    except (OverflowError, TypeError):  # more than a float holds, or no numbers
        total = math.inf
    if not given or len(given) != num_adapters or not 0.0 < total < math.inf or min(given) < 0.0:
        raise AdapterError(
            "weights: expected one for each of at least one adapter, none below 0, their sum finite and above 0, "
            f"got {given} for {counted(num_adapters, 'adapter')}; change them"
        )
    return [weight / total for weight in given]


def _refuse_ranks(adapters: Sequence[Adapter], method: str) -> None:
    for name, rank in adapters[0].ranks.items():
        differing = next((a.ranks[name] for a in adapters if a.ranks[name] != rank), None)
        if differing is not None:
            others = either(one for one in table.names("combines") if not table.traits_of(one).needs_one_rank)
            raise AdapterError(
                f"{method}: expected one rank for all adapters, got {rank} and {differing} at {name}; use {others}"
            )
