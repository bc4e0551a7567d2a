"""What runs of rounds give away: whether a row was trained on, tokens of an update, planted sequences; beside their ε.

Each is one attack, so a lower bound: another may read more. What the ledger's ε says bounds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data.tokens import TokenSet
from fedloom.privacy.token_recovery import Recovery, mean_recovery, recovery, token_scores
from fedloom.results.leaks import public_rows
from fedloom.results.opened_result import OpenedResult
from fedloom.results.replayed_rounds import Replay, SentUpdate
from fedloom.results.told_rows import Exposures, Membership, exposures, membership
from fedloom.run_folder.durable import plain
from fedloom.training.first_inputs import inputs_of_tokens
from fedloom.wording import Displayed, counted

NOTHING_CROSSES = "nothing crosses"
MASKED = "the server sees the sum alone"
NO_KNOWN_INPUTS = "no adapted layer reads the token alone"
NOTHING_MOVED = "no factor of the first block moved"


@dataclass(frozen=True)
class MeterSettings:
    """How much is looked at.

    Attributes:
        round: whose updates are attacked; None: the last one that can be run again.
        most_rows: rows of a client that are scored at most, read ones and others each.
        num_candidates: sequences that stand for all that could have been planted.
        public, shape: public rows, from which comes what is commonest, and their shape.
    """

    round: int | None = None
    most_rows: int = 200
    num_candidates: int = 1023
    public: str | None = None
    shape: str | None = None


@dataclass(frozen=True)
class Tokens:
    """What the updates of a round give away of their clients' tokens: on average, and by client."""

    round: int
    all: Recovery
    clients: dict[str, Recovery]


@dataclass(frozen=True)
class RoundLeakage:
    """What one run gives away, and what it cost.

    ``epsilon`` is of whoever spent most; None where no noise bounds it. ``tokens`` None has its reason in ``unread``.
    """

    path: Path
    method: str
    unit: str
    epsilon: float | None
    delta: float | None
    base_loss_nats: float | None
    loss_nats: float | None
    membership: Membership
    tokens: Tokens | None
    exposures: Exposures | None
    unread: str = ""


@dataclass(frozen=True)
class RoundLeakages(Displayed):
    """One report per run, in the order given."""

    runs: tuple[RoundLeakage, ...]
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return the reports as plain values; an ε that nothing bounds is null."""
        found: dict[str, Any] = plain({"runs": [asdict(one) for one in self.runs], "notes": list(self.notes)})
        return found

    def lines(self) -> list[str]:
        """Return the reports for people."""
        from fedloom.results.leak_table import table_lines

        return table_lines(self)


def round_leakage(
    opened: OpenedResult, settings: MeterSettings | None = None, on_step: Callable[[str], None] = lambda told: None
) -> RoundLeakage:
    """Measure what a run of rounds gives away.

    Raises:
        EvaluationError: the run has no rounds whose rows are here, or not the round that is asked for.
    """
    settings, replay = settings or MeterSettings(), Replay.of(opened)
    run = opened.found.run
    assert run is not None
    end, last = run.finished or {}, run.records[-1]
    privacy = last.get("privacy") or {}
    name = opened.found.path.name
    on_step(f"{name}: rows")
    told = membership(replay, settings.most_rows)
    on_step(f"{name}: updates")
    tokens, unread = _tokens(replay, settings)
    on_step(f"{name}: canaries")
    return RoundLeakage(
        path=opened.found.path,
        method=replay.settings.method.name,
        unit=replay.settings.privacy.unit,
        epsilon=privacy.get("epsilon"),
        delta=privacy.get("delta"),
        base_loss_nats=(end.get("base_eval") or {}).get("loss_nats"),
        loss_nats=((end or last).get("eval") or {}).get("loss_nats"),
        membership=told,
        tokens=tokens,
        exposures=exposures(replay, settings.num_candidates),
        unread=unread,
    )


def _tokens(replay: Replay, settings: MeterSettings) -> tuple[Tokens | None, str]:
    """Return what a round's updates give away, or why that is not measured."""
    if replay.settings.traits.is_control:
        return None, NOTHING_CROSSES
    if replay.settings.privacy.sum != "plain":
        return None, MASKED
    known = inputs_of_tokens(replay.opened.lora)
    if not known:
        return None, NO_KNOWN_INPUTS
    round = settings.round or replay.last_round()
    public = None
    if settings.public is not None:
        vocabulary = len(next(iter(known.values())))
        public = _counts(public_rows(replay.opened, settings.public, settings.shape), vocabulary)
    sent = [one for one in replay.sent(round) if len(one.read)]
    found: dict[str, Recovery] = {}
    for place, one in enumerate(sent):
        scores = token_scores(None if one.is_gradient else one.start, one.seen, known)
        if scores is None:
            return None, NOTHING_MOVED
        control = _control(replay, sent, place)
        found[replay.population.names[one.client]] = recovery(scores, _distinct(one.read), control, public)
    if not found:
        return None, NOTHING_MOVED
    return Tokens(round, mean_recovery(list(found.values())), found), ""


def _control(replay: Replay, sent: Sequence[SentUpdate], place: int) -> NDArray[np.int64]:
    """Return the tokens of another client's rows: of the next in the round, or of as many rows of one not in it."""
    if len(sent) > 1:
        return _distinct(sent[(place + 1) % len(sent)].read)
    own = sent[place]
    others = [client for client in range(replay.population.num_clients) if client != own.client]
    rows = replay.population.rows_of(others[0]) if others else own.read.select([])
    return _distinct(rows.select(range(min(len(rows), len(own.read)))))


def _distinct(rows: TokenSet) -> NDArray[np.int64]:
    return np.unique(rows.input_ids).astype(np.int64)


def _counts(rows: TokenSet, vocabulary: int) -> NDArray[np.int64]:
    return np.bincount(rows.input_ids, minlength=vocabulary)[:vocabulary].astype(np.int64)


def noted(runs: Sequence[RoundLeakage]) -> tuple[str, ...]:
    """Say what makes figures of these runs hard to compare."""
    notes = []
    if len({one.unit for one in runs if one.epsilon is not None}) > 1:
        notes.append("ε of runs that hide rows and of runs that hide clients are of different units")
    few = [one for one in runs if one.membership.all is not None and one.membership.all.found_at_few_alarms is None]
    if few:
        notes.append(f"{counted(len(few), 'run')} with too few other rows to tell one false alarm in a hundred")
    return tuple(notes)
