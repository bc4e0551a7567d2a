"""What an update is held against before it is used: what was asked of its client, the base, and finite numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedloom.errors import AdapterError, UpdateError
from fedloom.lora.algebra import distance, norm
from fedloom.lora.initial import Draw
from fedloom.lora.layer import check_fits
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Payload, Work
from fedloom.methods.state import Broadcast, Update
from fedloom.training.stats import TrainingStats

_COUNTS = ("num_rows", "num_tokens", "num_loss_tokens", "num_steps")
_MAX_LOSS_NATS, _MAX_SECONDS = 1e6, 1e9
"""A loss of no model, and longer than any run: beyond them a client's number would spoil the means it is part of."""


def check_update(
    update: Update,
    broadcast: Broadcast,
    work: Work,
    shapes: Mapping[str, tuple[int, int]],
    norm_limit: float | None,
) -> float:
    """Return the norm of the client's change, or refuse the update; of a gradient, the norm of its factors.

    Raises:
        UpdateError: if it is for another round, has wrong modules, shapes or ranks, is not finite, did not move, was
            trained on nothing, or its change has a norm above ``norm_limit``.
    """
    _check_types(update)
    if update.round != broadcast.round:
        raise UpdateError(f"expected an update for round {broadcast.round}, got one for round {update.round}")
    try:
        check_fits(update.adapter, shapes)
    except AdapterError as error:
        raise UpdateError(str(error)) from error
    wrong = {name: rank for name, rank in update.adapter.ranks.items() if rank != broadcast.rank}
    if wrong:
        name, rank = next(iter(wrong.items()))
        raise UpdateError(f"{name}: expected rank {broadcast.rank}, got {rank}")
    if not update.adapter.is_finite():
        raise UpdateError("expected finite numbers, got NaN or infinity; lower training.learning_rate")
    check_stats(update.stats)
    change = _change(update, broadcast, work)
    if change == 0.0:
        raise UpdateError(
            "expected the adapter to change during training, it is what was sent out: check training.learning_rate and "
            "model.target_modules"
        )
    if norm_limit is not None and change > norm_limit:
        raise UpdateError(f"expected a change of norm {norm_limit:.3g} or less, got {change:.3g}")
    return change


def check_stats(stats: TrainingStats) -> None:
    """Refuse counts that are none: not whole, below what they can be, not finite, or beyond all sense.

    Raises:
        UpdateError: naming the number.
    """
    for name in _COUNTS:
        count = getattr(stats, name)
        if type(count) is not int or count < 0:
            raise UpdateError(f"{name}: expected a whole number of 0 or more, got {_shown(count)}")
    if stats.num_rows < 1:
        raise UpdateError(f"expected training on at least one row, got {stats.num_rows}")
    for name in ("loss_nats", "loss_last_nats", "seconds"):
        number, largest = getattr(stats, name), _MAX_SECONDS if name == "seconds" else _MAX_LOSS_NATS
        if type(number) not in (float, int) or not -1.0 <= number <= largest:
            raise UpdateError(f"{name}: expected a number from 0 to {largest:.0e}, got {_shown(number)}")


def _shown(value: object) -> str:
    try:
        return repr(value)[:40]
    except Exception as error:  # an integer of too many digits, or whatever an object of another make does
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"


def _check_types(update: object) -> None:
    """Refuse what an engine of another make hands over in an update's place."""
    parts = (("adapter", Adapter), ("stats", TrainingStats))
    if not isinstance(update, Update):
        raise UpdateError(f"expected an update or a failure, got {type(update).__name__}; the engine is broken")
    for name, kind in parts:
        if not isinstance(getattr(update, name), kind):
            got = type(getattr(update, name)).__name__
            raise UpdateError(f"{name}: expected {kind.__name__} in an update, got {got}; the engine is broken")


def _change(update: Update, broadcast: Broadcast, work: Work) -> float:
    if update.change_norm is not None:
        return update.change_norm
    if work.payload is Payload.GRADIENT:
        return math.hypot(*(float(t.double().norm()) for t in update.adapter.as_tensors(work.sends).values()))
    if isinstance(broadcast.start, Draw):
        return norm(update.adapter)
    return distance(update.adapter, broadcast.start)
