"""What an update is held against before it is used: what was asked of its client, the base, and finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedloom.errors import AdapterError, UpdateError
from fedloom.lora.algebra import distance, norm
from fedloom.lora.initial import Draw
from fedloom.lora.layer import check_fits
from fedloom.lora.pair import Adapter, rank_in
from fedloom.methods.client_half import Work
from fedloom.methods.state import Broadcast, Update
from fedloom.training.stats import TrainingStats

_COUNTS = ("num_rows", "num_tokens", "num_loss_tokens", "num_steps")
_MAX_LOSS_NATS, _MAX_SECONDS = 1e6, 1e9
"""A loss of no model, and longer than any run: beyond them a client's number would spoil the means it is part of."""


@dataclass(frozen=True)
class Asked:
    """What the server knows of a client's round before it begins, and holds the client's own counts against.

    Attributes:
        num_rows: rows registered before the first round; weights by rows are these.
        max_steps: optimiser steps asked for.
        max_tokens: tokens that so many steps can read: steps x rows of a batch x tokens of the longest row.
        work: rows that it is asked to train on in the round, those of further passes counted again.
    """

    num_rows: int
    max_steps: int
    max_tokens: int
    work: int = 1


def check_update(
    update: Update, broadcast: Broadcast, work: Work, shapes: Mapping[str, tuple[int, int]], asked: Asked | None
) -> float:
    """Return the norm of the client's change, or refuse the update; where no product crosses, that of the factors.

    ``asked`` is None for the server's own part, whose counts are sums over the clients it stands in for.

    Raises:
        UpdateError: if it is for another round, has wrong modules, shapes or ranks, is not finite, did not move, or
            its counts are not those of what was asked.
    """
    _check_types(update)
    if update.round != broadcast.round:
        raise UpdateError(
            f"expected an update for round {broadcast.round}, got one for round {update.round}; send that"
        )
    try:
        check_fits(update.adapter, shapes)
    except AdapterError as error:
        raise UpdateError(str(error)) from error
    asked_of = {name: rank_in(shape, broadcast.rank) for name, shape in shapes.items()}
    wrong = {name: rank for name, rank in update.adapter.ranks.items() if rank != asked_of[name]}
    if wrong:
        name, rank = next(iter(wrong.items()))
        raise UpdateError(f"{name}: expected rank {asked_of[name]}, got {rank}; train at that rank")
    if not update.adapter.is_finite():
        raise UpdateError("expected finite numbers, got NaN or infinity; lower training.learning_rate")
    check_stats(update.stats, asked)
    change = _change(update, broadcast, work)
    if change == 0.0:
        raise UpdateError(
            "expected the adapter to change during training, it is what was sent out: check training.learning_rate and "
            "model.target_modules"
        )
    if not math.isfinite(change):
        raise UpdateError("expected a change of finite norm, got one beyond all numbers; lower training.learning_rate")
    return change


def factor_norms(update: Update, work: Work) -> dict[str, float]:
    """Return the norm over all modules of each factor that crosses; of gradients none, which are judged as they are."""
    if work.is_gradient:
        return {}
    return {factor: _norm(update.adapter.as_tensors(frozenset(factor)).values()) for factor in sorted(work.sends)}


def check_stats(stats: TrainingStats, asked: Asked | None) -> None:
    """Refuse counts that are none, or are not those of what was asked: not whole, not finite, too few or too many.

    Raises:
        UpdateError: naming the number.
    """
    for name in _COUNTS:
        count = getattr(stats, name)
        if type(count) is not int or count < 0:
            raise UpdateError(f"{name}: expected a whole number of 0 or more, got {_shown(count)}; send its count")
    if stats.num_rows < 1:
        raise UpdateError(f"expected training on at least one row, got {stats.num_rows}; check the client's rows")
    if asked is not None:
        _check_asked(stats, asked)
    for name in ("loss_nats", "loss_last_nats", "seconds"):
        number, largest = getattr(stats, name), _MAX_SECONDS if name == "seconds" else _MAX_LOSS_NATS
        if type(number) not in (float, int) or not -1.0 <= number <= largest:
            raise UpdateError(
                f"{name}: expected a number from 0 to {largest:.0e}, got {_shown(number)}; send its count"
            )


def _check_asked(stats: TrainingStats, asked: Asked) -> None:
    if stats.num_rows != asked.num_rows:
        raise UpdateError(
            f"num_rows: expected {asked.num_rows}, as registered before the first round, got {stats.num_rows}; "
            "start the run anew where the client's rows have changed"
        )
    limits = {"num_steps": asked.max_steps, "num_tokens": asked.max_tokens, "num_loss_tokens": stats.num_tokens}
    for name, limit in limits.items():
        if getattr(stats, name) > limit:
            raise UpdateError(f"{name}: expected at most {limit}, got {getattr(stats, name)}; check the client")


def _shown(value: object) -> str:
    try:
        return repr(value)[:40]
    except Exception as error:  # an integer of too many digits, or whatever an object of another make does
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"


def _check_types(update: object) -> None:
    """Refuse what an engine of another make hands over in an update's place."""
    parts = (("adapter", Adapter), ("stats", TrainingStats))
    if not isinstance(update, Update):
        raise UpdateError(f"expected an update or a failure, got {type(update).__name__}; fix the engine")
    for name, kind in parts:
        if not isinstance(getattr(update, name), kind):
            got = type(getattr(update, name)).__name__
            raise UpdateError(f"{name}: expected {kind.__name__} in an update, got {got}; fix the engine")


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(tensor.double().norm()) for tensor in tensors))


def _change(update: Update, broadcast: Broadcast, work: Work) -> float:
    if update.change_norm is not None:
        return update.change_norm
    if work.is_gradient:
        return _norm(update.adapter.as_tensors(work.sends).values())
    if isinstance(broadcast.start, Draw):
        return norm(update.adapter)
    began = broadcast.trained
    assert isinstance(began, Adapter)
    if work.keeps:
        before, after = began.as_tensors(work.sends), update.adapter.as_tensors(work.sends)
        return _norm(after[key].double() - before[key].double() for key in after)
    return distance(update.adapter, began)
