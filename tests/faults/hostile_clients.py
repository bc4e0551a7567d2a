"""One hostile client in ten, in every way and under every rule: how far the aggregate moves, in median changes.

Everything it does is done on the wire: its message is encoded, changed, and read by the server as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from federation.test_robust import (
    ASKED,
    COHORT,
    EXACT,
    HOSTILE,
    METHODS,
    NUM,
    RANK,
    SHAPES,
    honest,
    median_norm,
    start_of,
    started,
)

from fedloom.federation.blob import WireDtype
from fedloom.federation.intake import Arrival, Intake
from fedloom.federation.messages import decode_answer, encode_update
from fedloom.federation.robust import Robust, RobustRule
from fedloom.federation.rounds import RoundPlan
from fedloom.federation.server import ServerRules, broadcasts_for
from fedloom.lora.algebra import distance
from fedloom.lora.pair import Adapter
from fedloom.methods.carry import Carry
from fedloom.methods.client_half import Work
from fedloom.methods.rolora import RoLoRA
from fedloom.methods.server_steps import PlainStep
from fedloom.methods.state import Aggregate, Broadcast, Failure, Update
from fedloom.methods.strategy import Strategy
from fedloom.methods.weave import Weave

Tensors = dict[str, torch.Tensor]
Act = Callable[[Update, Tensors, Tensors], bytes]
EVERY_METHOD: Mapping[str, Callable[[], Strategy]] = {
    **METHODS,
    "rolora": lambda: RoLoRA(COHORT),
    "weave": lambda: Weave(COHORT),
    "carry": lambda: Carry(COHORT),
}


def _sent(update: Update, tensors: Mapping[str, torch.Tensor]) -> bytes:
    return encode_update(update, tensors, WireDtype.FP32)


def _moved(factor: float) -> Act:
    """Send the start and ``factor`` times the change of B, or of A where only that is trained."""

    def act(update: Update, tensors: Tensors, start: Tensors) -> bytes:
        chosen = [key for key in tensors if key.endswith(".b")] or list(tensors)
        return _sent(update, tensors | {key: start[key] + factor * (tensors[key] - start[key]) for key in chosen})

    return act


def _scaled(b: float, a: float) -> Act:
    return lambda u, tensors, _: _sent(u, {k: t * (b if k.endswith(".b") else a) for k, t in tensors.items()})


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Act:
    return lambda update, tensors, _: _sent(update, {key: change(tensor) for key, tensor in tensors.items()})


def _counted(**numbers: Any) -> Act:
    return lambda u, tensors, _: _sent(replace(u, stats=replace(u.stats, **numbers)), tensors)


WAYS: Mapping[str, Act] = {
    "sign flip": _moved(-1.0),
    "sign flip, 50 ×": _moved(-50.0),
    "90 × the norm": _moved(90.0),
    "10⁶ × the norm": _moved(1e6),
    "`B·50`, `A/50`": _scaled(50, 0.02),
    "`B/50`, `A·50`": _scaled(0.02, 50),
    "`B·10⁶`, `A/10⁶`": _scaled(1e6, 1e-6),
    "10¹² rows": _counted(num_rows=10**12),
    "most tokens it may claim": _counted(num_tokens=80, num_loss_tokens=80),
    "10⁹ tokens": _counted(num_tokens=10**9, num_loss_tokens=10**9),
    "NaN": _each(lambda tensor: tensor * math.nan),
    "infinity": _each(lambda tensor: tensor / 0.0),
    "garbage": lambda *_: b"\xff" * 4096,
    "empty": lambda *_: b"",
    "wrong shape": _each(lambda tensor: torch.cat([tensor, tensor])),
    "a vector": _each(lambda tensor: tensor.flatten()),
    "another round": lambda update, tensors, _: _sent(replace(update, round=7), tensors),
    "another client": lambda update, tensors, _: _sent(replace(update, client=0), tensors),
    "256 MB more": lambda update, tensors, _: _sent(update, tensors) + bytes(256 << 20),
}


@dataclass(frozen=True)
class Power:
    """How far one client moved the aggregate, in medians of the honest changes, and what may be."""

    method: str
    way: str
    rule: Robust
    moved: float
    bound: float | None

    @property
    def is_within(self) -> bool:
        """Whether it is a number, and at most the bound where there is one."""
        return math.isfinite(self.moved) and (self.bound is None or self.moved <= self.bound)


def bound_of(method: str) -> float:
    """Return what the page states: twice its share, which a mean of factors misses by their covariance."""
    return (2.0 if method in EXACT else 2.5) / NUM * 1.1


def powers(method: str, part: float = 1.0) -> Iterator[Power]:
    """Yield what one client in ten can do to a method, in a seeded part of the ways, under every rule and without."""
    rng = np.random.default_rng([12, list(EVERY_METHOD).index(method)])
    chosen = [way for way in WAYS if rng.random() < part]
    strategy = EVERY_METHOD[method]()
    unit = median_norm(strategy)
    for rule in Robust:
        if (method, rule) == ("flora", Robust.COSINE):
            continue  # changes of independent draws have no common direction: refused by the settings
        clean = _aggregate(strategy, rule, None)
        for way in chosen:
            moved = distance(_aggregate(strategy, rule, WAYS[way]).applied, clean.applied) / unit
            yield Power(method, way, rule, moved, None if rule is Robust.NONE else bound_of(method))


def _aggregate(strategy: Strategy, rule: Robust, act: Act | None) -> Aggregate:
    state, clients = started(strategy), list(range(NUM if act else NUM - 1))
    broadcasts = broadcasts_for(state, clients, strategy, dict.fromkeys(clients, RANK), dict.fromkeys(clients, 2.0))
    work = strategy.client.work(1)
    arrivals = [Arrival(_answer(one, work, act if one.client == HOSTILE else None), 0, 0) for one in broadcasts]
    plan = RoundPlan(
        1, strategy, ServerRules(PlainStep()), lambda round: clients, SHAPES, {}, {}, lambda c: ASKED,
        robust=RobustRule(rule),
    )  # fmt: skip
    intake = Intake(plan, work, state, broadcasts)
    return strategy.aggregate(state, intake.usable(arrivals, lambda update: None))


def _answer(broadcast: Broadcast, work: Work, act: Act | None) -> Update | Failure:
    update, start = honest(broadcast, work.trains), start_of(broadcast)
    assert isinstance(start, Adapter)
    if act is None:
        return update
    tensors, before = update.adapter.as_tensors(work.sends), start.as_tensors(work.sends)
    blob = act(update, dict(tensors), dict(before))
    return decode_answer(blob, broadcast, work, SHAPES, WireDtype.FP32, lambda draw: draw.adapter(SHAPES, RANK, 1))
