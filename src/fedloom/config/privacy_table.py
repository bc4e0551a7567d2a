"""The table that says what differential privacy a run has, and what it may cost."""

from __future__ import annotations

from typing import Literal

from fedloom.config.setting import Count, OpenFraction, Positive, Table, having, setting

SUMMED = {"privacy.sum": ("masked", "sketch")}
PRIVATE = {"privacy.unit": ("row", "client")}


class Privacy(Table):
    """What is hidden, from whom, and how well. It needs the extra `privacy`; [what it means](privacy.md)."""

    unit: Literal["none", "row", "client"] = setting(
        "none",
        "What is hidden. `row`: a row of a client's file, or all rows of a value of `data.unit_column`; clients take "
        "Poisson batches of them, clip each one's gradient, add noise to the sum, and send no losses and no counts of "
        "a batch. `client`: a client with all its rows; the server clips each client's change and adds noise to their "
        "sum.",
        when={"method.name": having("runs_rounds")},
    )
    clip: Positive = setting(
        1.0,
        "Largest norm, over all modules, of the gradient of a row (or of all rows of a value of `data.unit_column`) or "
        "of a client's change of the product; what is larger is scaled down to it.",
        when=PRIVATE,
    )
    noise_multiplier: Positive = setting(
        1.0, "Standard deviation of the noise on the clipped sum, in multiples of `privacy.clip`.", when=PRIVATE
    )
    rows_per_unit: Count | None = setting(
        None,
        "Most rows that a step reads of each value of `data.unit_column`, drawn anew each time; default: all. What is "
        "hidden is the same, a step takes less time.",
        when={"privacy.unit": ("row",)},
    )
    delta: OpenFraction = setting(
        1e-5,
        "The δ at which ε is counted; keep it well below one by the number of units: a client's rows (or values of "
        "`data.unit_column`), or the clients.",
        when=PRIVATE,
    )
    max_epsilon: Positive | None = setting(
        None,
        "Most that may be spent. Where rows are hidden a client stops taking part before a round that would pass it, "
        "and its record says so; where clients are, the run ends. Default: no limit, ε is counted all the same.",
        when=PRIVATE,
    )
    sum: Literal["plain", "masked", "sketch"] = setting(
        "plain",
        "Whether the server sees each client's update, or their sum alone: clients put masks on that cancel in it. "
        "`masked`: a sum of factors, for methods that average them. `sketch`: a sum of sketches of the products, for "
        "methods that stack them, whatever the ranks.",
        when={"method.name": having("sums")},
    )
    sketch_rank: Count | None = setting(
        None,
        "Rank of the clients' sum, in each module, that sketches give exactly. Lower than its default it sends less, "
        "and what a sum has beyond that rank is lost. Default: the largest ranks that a round's clients have together.",
        when={"privacy.sum": ("sketch",)},
    )
    noise: Literal["server", "clients"] = setting(
        "server",
        "Who adds the noise to a masked sum of hidden clients: the server, which then sees the sum without it, or "
        "`clients`, each a share, of which those of `threshold` clients make up the whole.",
        when={"privacy.unit": ("client",), "privacy.sum": ("masked",)},
    )
    threshold: Count | None = setting(
        None,
        "Clients of a round that must stay to the end of a masked sum, more than two thirds of those drawn; default: "
        "the fewest that are.",
        when=SUMMED,
    )
