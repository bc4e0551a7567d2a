"""What a released adapter tells of the rows it was trained on: whether one was among them, and planted sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.data.canaries import Canary, rows_of_sequences, sequences
from fedloom.data.tokens import TokenSet
from fedloom.privacy.exposure import UNPLANTED_BITS, exposure_bits, most_bits
from fedloom.privacy.membership import Separation, separation
from fedloom.results.chosen_round import RESULT
from fedloom.results.replayed_rounds import Replay
from fedloom.seeding import stream
from fedloom.training.row_losses import row_losses

FEWEST_UNREAD = 20
"""Rows of a client's own that it did not read, below which held-out rows take their place."""
TOKEN_BUDGET = 8192


@dataclass(frozen=True)
class Membership:
    """How far the rows that clients read are told apart from others, in all and by client.

    ``others`` says what the others are: rows of the same clients that no round read, the clients' own held-out ones
    included (``unread``), the run's held-out rows (``held-out``), or, by client, the one or the other.
    """

    all: Separation | None
    clients: dict[str, Separation]
    others: str


@dataclass(frozen=True)
class Exposures:
    """What canaries that were read are exposed by, in bits; of the base as of a sequence never planted.

    Attributes:
        bits: mean over canaries of the exposure by the model's loss, as in The Secret Sharer.
        bits_against_base: mean of that by the loss less the base's, by which what is easy for the base is not counted.
        most: the most exposed, against the base.
        ceiling: what a sample of so many candidates can show at most.
        unplanted: what is expected of a sequence that was never planted.
        num_canaries, num_read: those planted, and those of which a round read a copy.
    """

    bits: float | None
    bits_against_base: float | None
    most: float | None
    ceiling: float
    unplanted: float
    num_canaries: int
    num_read: int


@dataclass(frozen=True, eq=False)
class RowReader:
    """Scores rows under the released adapters and the base."""

    replay: Replay

    def mean_nats(self, client: int, rows: TokenSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return each row's mean loss under the adapter that a client gets, and under the base."""
        opened = self.replay.opened
        own = f"client-{client}"
        name = own if own in opened.adapters else next((one for one in (RESULT,) if one in opened.adapters), None)
        under, base = self._nats(name, rows), self._nats(None, rows)
        return under, base

    def _nats(self, name: str | None, rows: TokenSet) -> NDArray[np.float64]:
        losses = row_losses(self.replay.opened.use(name), rows, token_budget=TOKEN_BUDGET)
        return losses.sum_nats / np.maximum(losses.num_loss_tokens, 1)


def membership(replay: Replay, most_rows: int) -> Membership:
    """Tell rows that clients read from others; at most ``most_rows`` of either a client, drawn by the run's seed."""
    reader, seed = RowReader(replay), replay.settings.run.seed
    scores: list[tuple[str, NDArray[np.float64], NDArray[np.float64]]] = []
    used = set()
    for client, read in replay.read().items():
        rows, count = replay.population.rows_of(client), replay.num_own_rows(client)
        members, unread = read[read < count], np.setdiff1d(np.arange(count), read)
        rng = stream(seed, "membership", client)
        others, kind = rows.select(unread), "unread"
        if (own := replay.inputs.own).tokens is not None and client in own.members:
            others = TokenSet.concatenate([others, own.tokens.select(own.members[client])])
        others = others.select(_drawn(rng, np.arange(len(others)), most_rows))
        if len(others) < FEWEST_UNREAD and replay.inputs.held_out is not None:
            held, kind = replay.inputs.held_out, "held-out"
            others = held.select(_drawn(rng, np.arange(len(held)), most_rows))
        chosen = rows.select(_drawn(rng, members, most_rows))
        if not len(chosen) or not len(others):
            continue
        used.add(kind)
        under, base = reader.mean_nats(client, TokenSet.concatenate([chosen, others]))
        gain = base - under
        scores.append((replay.population.names[client], gain[: len(chosen)], gain[len(chosen) :]))
    if not scores:
        return Membership(None, {}, "none")
    together = separation(np.concatenate([one[1] for one in scores]), np.concatenate([one[2] for one in scores]))
    clients = {name: found for name, members, others in scores if (found := separation(members, others)) is not None}
    return Membership(together, clients, " and ".join(sorted(used, reverse=True)))


def exposures(replay: Replay, num_candidates: int) -> Exposures | None:
    """Return what is exposed of the run's canaries; None where it has none."""
    canaries = replay.inputs.canaries
    if not canaries:
        return None
    reader, names = RowReader(replay), replay.inputs.partition.names
    tokenizer, seed = replay.opened.base.tokenizer, replay.settings.run.seed
    others = rows_of_sequences(sequences(tokenizer, num_candidates, seed, "candidates"))
    read = _read(replay)
    plain: list[float] = []
    against: list[float] = []
    for client in sorted({names.index(canary.client) for canary in read}):
        mine = [canary for canary in read if canary.client == names[client]]
        under, base = reader.mean_nats(client, TokenSet.concatenate([*(one.row for one in mine), others]))
        for exposed, loss in ((plain, under), (against, under - base)):
            exposed += [exposure_bits(one, loss[len(mine) :]) for one in loss[: len(mine)].tolist()]
    return Exposures(
        bits=float(np.mean(plain)) if plain else None,
        bits_against_base=float(np.mean(against)) if against else None,
        most=max(against, default=None),
        ceiling=most_bits(num_candidates),
        unplanted=UNPLANTED_BITS,
        num_canaries=len(canaries),
        num_read=len(read),
    )


def _read(replay: Replay) -> list[Canary]:
    """Return the canaries of which a round read a copy."""
    canaries, found = replay.inputs.canaries, []
    for client, read in replay.read().items():
        held = canaries
        if not replay.settings.traits.pools_rows:
            held = tuple(one for one in canaries if one.client == replay.population.names[client])
        copies = [canary for canary in held for _ in range(canary.repetitions)]
        places = read[read >= replay.num_own_rows(client)] - replay.num_own_rows(client)
        found += list(dict.fromkeys(copies[place] for place in places.tolist()))
    return found


def _drawn(rng: np.random.Generator, positions: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return np.sort(rng.permutation(positions)[:most])
