"""What a server checks before an update may touch the global model."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.errors import AdapterError, UpdateError
from fedloom.lora.algebra import distance, norm
from fedloom.lora.initial import Draw
from fedloom.lora.layer import check_fits
from fedloom.methods.state import Broadcast, Update


def check_update(
    update: Update,
    broadcast: Broadcast,
    shapes: Mapping[str, tuple[int, int]],
    norm_limit: float | None,
) -> float:
    """Return the norm of the client's change, or refuse the update.

    Raises:
        UpdateError: if it is for another round, has wrong modules, shapes or ranks, is not finite, did not move, was
            trained on nothing, or its change has a norm above ``norm_limit``.
    """
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
    if update.num_rows < 1:
        raise UpdateError(f"expected training on at least one row, got {update.num_rows}")
    change = norm(update.adapter) if isinstance(broadcast.start, Draw) else distance(update.adapter, broadcast.start)
    if change == 0.0:
        raise UpdateError("expected trained weights to move, they are what was sent out")
    if norm_limit is not None and change > norm_limit:
        raise UpdateError(f"expected a change of norm {norm_limit:.3g} or less, got {change:.3g}")
    return change
