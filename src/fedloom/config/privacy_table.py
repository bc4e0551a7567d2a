"""The table that says what differential privacy a run has, and what it may cost."""

from __future__ import annotations

from typing import Literal

from fedloom.config.setting import Positive, Table, having, setting

PRIVATE = {"privacy.unit": ("row",)}


class Privacy(Table):
    """What is hidden, and how well: differential privacy."""

    unit: Literal["none", "row"] = setting(
        "none",
        "What is hidden. `row`: a row of a client's file; clients take Poisson batches, clip each row's gradient, add "
        "noise to the sum, and send no losses and no counts of a batch.",
        when={"method.name": having("runs_rounds")},
    )
    clip: Positive = setting(
        1.0, "Largest norm of one unit's gradient over all modules; a larger one is scaled down to it.", when=PRIVATE
    )
    noise_multiplier: Positive = setting(
        1.0, "Standard deviation of the noise on the clipped sum, in multiples of `privacy.clip`.", when=PRIVATE
    )
