"""The passes that the engine would make of a run's rows, cut by its own rules, before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedloom.assembly.round_plan import training_of
from fedloom.config import Settings
from fedloom.lora.layer import LoRAModel
from fedloom.preview.held_bytes import PlannedPass
from fedloom.preview.row_sample import RowSample
from fedloom.seeding import stream
from fedloom.training.client_passes import spread
from fedloom.training.row_losses import scoring_spread
from fedloom.training.row_passes import RowPasses, row_passes

_DRAWS = 16
"""Steps that are drawn to find the largest pass."""


class Part(NamedTuple):
    """A client's rows of one pass: its slot and the rows' places in the sample."""

    slot: int
    rows: tuple[int, ...]


def ranks_of(settings: Settings) -> Sequence[int]:
    """Return the ranks of all adapters that a run trains."""
    split, ranks = settings.split, settings.client_ranks
    if not settings.traits.is_cut:
        return ranks
    return [*settings.per_client(split.client_rank or settings.method.ranks), split.server_rank or max(ranks)]


def pass_limits(settings: Settings, lora: LoRAModel, device: str) -> tuple[int, int]:
    """Return the tokens of a pass at most, and how many passes are under way at once, each on a core."""
    return spread(lora, training_of(settings), device)


def largest_pass(settings: Settings, lora: LoRAModel, sample: RowSample, num_clients: int, device: str) -> list[Part]:
    """Return the members of the largest of the passes of some drawn steps of the clients that are open at once."""
    chance = stream(settings.run.seed, "describe", "passes")
    passes, limits = row_passes(lora.model), pass_limits(settings, lora, device)
    drawn = [
        group
        for _ in range(_DRAWS)
        for group in _passes_of_a_step(settings, passes, sample, num_clients, chance, limits)
    ]

    def tokens(group: list[Part]) -> int:
        lengths = [int(sample.lengths_N[row]) for part in group for row in part.rows]
        return sum(lengths) if passes.name == "packed" else len(lengths) * max(lengths)

    return max(drawn, key=tokens)


def _passes_of_a_step(
    settings: Settings,
    passes: RowPasses,
    sample: RowSample,
    num_clients: int,
    chance: np.random.Generator,
    limits: tuple[int, int],
) -> Iterator[list[Part]]:
    """Yield who shares a pass in one step, as :class:`~fedloom.training.client_passes.Passes` puts them together."""
    size, lengths, (budget, at_once) = settings.training.batch_size, sample.lengths_N, limits
    clients = [chance.integers(0, len(lengths), size) for _ in range(num_clients)]
    if settings.traits.is_cut:  # the server's half sees the whole batch, of one client or of all
        joint = settings.split.server_update == "joint"
        yield [Part(slot, tuple(rows.tolist())) for slot, rows in enumerate(clients if joint else clients[:1])]
        return
    most = training_of(settings).most_at_once
    cut = [passes.split([[int(lengths[row])] for row in rows], budget, most) for rows in clients]
    groups = list[list[Part]]()
    for turn in range(max(map(len, cut))):
        ready = [
            Part(slot, tuple(int(rows[i]) for i in parts[turn]))
            for slot, (rows, parts) in enumerate(zip(clients, cut, strict=True))
            if turn < len(parts)
        ]
        for members in passes.split([[int(lengths[row]) for row in part.rows] for part in ready], budget):
            groups.append([ready[i] for i in members])
    # What is under way at once on several cores holds as much as one pass of it all.
    for first in range(0, len(groups), at_once):
        yield [part for group in groups[first : first + at_once] for part in group]


def training_pass(settings: Settings, sample: RowSample, parts: Sequence[Part], *, merges: bool) -> PlannedPass:
    """Return a pass of these parts; ``merges``: attention needs no matrices, so that few long rows stand for all."""
    training = training_of(settings)
    units = training.num_unit_slots
    rank, opened = max(ranks_of(settings)), max(part.slot for part in parts) + 1 + units
    lengths, owners = list[int](), list[int]()
    for part in parts:
        own = [int(sample.lengths_N[row]) for row in part.rows]
        own = own if units or not merges else _merged(own, 1 if len(parts) > 1 else 2)
        lengths += own
        owners += [1 + i % units for i in range(len(own))] if units else [part.slot] * len(own)
    targets = sum(int(sample.targets_N[row]) for part in parts for row in part.rows)
    return PlannedPass(
        tuple(lengths),
        targets,
        (rank,) * opened,
        tuple(owners),
        training.dropout,
        training.label_smoothing,
        training.checkpoint_activations,
    )


def scoring_pass(settings: Settings, model: Any, sample: RowSample, device: str, *, merges: bool) -> PlannedPass:
    """Return a pass of the longest rows, as many as are under way at once."""
    longest = int(sample.lengths_N.max())
    part, at_once = scoring_spread(model, device, settings.evaluation.batch_tokens, settings.engine.cores)
    rows = at_once * max(1, part // longest)
    if settings.data.eval_rows is not None:
        rows = min(rows, settings.data.eval_rows)
    share = sample.targets_N.sum() / sample.lengths_N.sum()
    lengths = [longest] * rows
    return PlannedPass(tuple(_merged(lengths, 2) if merges else lengths), max(1, round(share * longest * rows)))


def _merged(lengths: Sequence[int], most: int) -> list[int]:
    """Return as many tokens in at most so many rows: attention without matrices holds by the token."""
    rows = min(most, len(lengths))
    return [sum(lengths) // rows + (i < sum(lengths) % rows) for i in range(rows)]
