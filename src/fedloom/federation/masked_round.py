"""A round whose server sees the clients' sum and no update: the messages of a secure sum around their training.

Clients and server are in one process here, so it is a simulation: what a client does with its own update is done
between its arrival and its masked message, and what the server works with are the messages of
:mod:`fedloom.privacy.secure_sum`. Masks are drawn from the operating system; they cancel, so the result repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import TooFewClientsError, UpdateError
from fedloom.federation.intake import Arrival, ClientRecord, advice_after
from fedloom.federation.update_checks import Asked, check_update
from fedloom.federation.weights import capped
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Work
from fedloom.methods.masked_sums import MaskedSums, Numbers
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.methods.strategy import Weighting, normalised
from fedloom.privacy.secure_sum import member, server
from fedloom.privacy.secure_sum.fixed_point import from_ring, to_ring
from fedloom.privacy.secure_sum.wire import Session, context_of
from fedloom.training.stats import TrainingStats


@dataclass(frozen=True)
class Masking:
    """How sums are masked: the clients that must stay (None: more than two thirds), and what names the run."""

    threshold: int | None
    run: str


class MaskedRules(Protocol):
    """What a masked round needs of a plan."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every target module."""
        ...

    @property
    def min_clients(self) -> int:
        """Clients in the sum without which the run ends."""
        ...

    @property
    def max_weight(self) -> float:
        """Largest share of one client."""
        ...

    def asked(self, client: int) -> Asked:
        """Return what a client's counts are held against, at the client."""
        ...


@dataclass(frozen=True, eq=False)
class MaskedRound:
    """What the server knows of a round: the sum, who is in it with which share, and why others are not."""

    numbers: Numbers
    shares: Mapping[int, float]
    held: Mapping[int, int]
    clients: tuple[ClientRecord, ...]

    def records(self, weights: Mapping[int, float]) -> tuple[ClientRecord, ...]:
        """Return one record per client in the order of the ids, with the weights that the strategy gave."""
        return tuple(replace(one, weight=weights.get(one.client, 0.0)) for one in self.clients)


def threshold_of(threshold: int | None, num_clients: int) -> int:
    """Return how many of so many clients must stay: by default the fewest that are more than two thirds of them."""
    return threshold if threshold is not None else 2 * num_clients // 3 + 1


def session_of(masking: Masking, strategy: MaskedSums, clients: Sequence[int], round: int) -> Session:
    """Return the session of a round's sum.

    Raises:
        TooFewClientsError: the clients are too few for a sum that hides one, or for the threshold.
    """
    needed = threshold_of(masking.threshold, len(clients))
    try:
        return Session(context_of(masking.run, round), tuple(sorted(clients)), needed, strategy.num_numbers)
    except ValueError as error:
        raise TooFewClientsError(
            f"round {round}: expected at least 3 clients for a secure sum (privacy.sum), of whom {needed} stay, got "
            f"{len(clients)}; {advice_after(round - 1)}"
        ) from error


def masked_round(
    plan: MaskedRules,
    session: Session,
    strategy: MaskedSums,
    work: Work,
    broadcasts: Sequence[Broadcast],
    arrivals: Iterator[Arrival],
) -> MaskedRound:
    """Run a round's secure sum around the training, which begins with the first of the ``arrivals`` that is asked for.

    Raises:
        TooFewClientsError: fewer clients stayed than the threshold, or than ``plan.min_clients``.
    """
    sent = {broadcast.client: broadcast for broadcast in broadcasts}
    shares, post = _shares(plan, strategy.weighting, session.members), _Post(session)
    begun = {k: post.up(k, member.begin(session, k)) for k in session.members}
    roster, told = server.roster(session, post.messages("keys"))
    shared = {k: post.answer(k, "shares", partial(_share, post, begun[k], told)) for k in roster.known}
    delivered, posted = server.delivered(roster, post.messages("shares"), post.left)
    masked, held, bytes_down = dict[int, Any](), dict[int, int](), dict[int, int]()
    for arrival in arrivals:
        outcome, client = arrival.outcome, arrival.outcome.client
        if client not in posted or client in bytes_down:
            continue
        bytes_down[client] = arrival.download_bytes
        if outcome.held is not None and 0 <= outcome.held <= sent[client].news.version:
            held[client] = outcome.held
        if isinstance(outcome, Failure):
            post.left[client] = str(outcome.reason)
            continue

        def put_on(update: Update = outcome, client: int = client) -> tuple[member.Masked, bytes]:
            numbers = _numbers(update, sent[client], work, plan, strategy, shares[client])
            words = to_ring(numbers, len(session.members))
            return member.masked(shared[client], post.down(client, posted[client]), words)

        masked[client] = post.answer(client, "masked", put_on)
    summed, survivors = server.summed(delivered, post.messages("masked"), post.left)
    for k in summed.members:
        post.answer(k, "told", partial(_tell, post, masked[k], survivors))
    words = server.unmasked(summed, post.messages("told"), post.left)
    records = []
    for k in session.members:
        is_in = k in summed.members
        reason = None if is_in else summed.left.get(k)
        down = bytes_down.get(k, 0) + post.bytes_down.get(k, 0)
        stats = TrainingStats(plan.asked(k).num_rows) if is_in else None
        records.append(ClientRecord(k, reason, down, post.bytes_up.get(k, 0), stats, session.length if is_in else 0))
    if len(summed.members) < plan.min_clients:
        reasons = "; ".join(f"client {one.client}: {one.reason}" for one in records if one.reason is not None)
        raise TooFewClientsError(
            f"expected at least {plan.min_clients} clients in the sum (federation.min_clients), got "
            f"{len(summed.members)} ({reasons}); mend the cause and run again"
        )
    in_sum = {k: shares[k] for k in summed.members}
    return MaskedRound(_by_name(from_ring(words), strategy), in_sum, held, tuple(records))


def _share(post: _Post, begun: member.Keyed, roster: bytes) -> tuple[member.Shared, bytes]:
    return member.shared(begun, post.down(begun.member, roster))


def _tell(post: _Post, masked: member.Masked, survivors: bytes) -> tuple[None, bytes]:
    return None, member.told(masked, post.down(masked.shared.keyed.member, survivors))


class _Post:
    """What crosses between members and server: messages by step, their bytes, and why somebody left."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kept: dict[str, dict[int, bytes]] = {}
        self.bytes_up: dict[int, int] = {}
        self.bytes_down: dict[int, int] = {}
        self.left: dict[int, str] = {}

    def messages(self, step: str) -> Mapping[int, bytes]:
        return self._kept.get(step, {})

    def up(self, client: int, made: tuple[Any, bytes], step: str = "keys") -> Any:
        """Pass a member's message on to the server; return what the member knows now."""
        knows, message = made
        self._kept.setdefault(step, {})[client] = message
        self.bytes_up[client] = self.bytes_up.get(client, 0) + len(message)
        return knows

    def down(self, client: int, message: bytes) -> bytes:
        """Pass a message of the server on to a member."""
        self.bytes_down[client] = self.bytes_down.get(client, 0) + len(message)
        return message

    def answer(self, client: int, step: str, make: Callable[[], tuple[Any, bytes]]) -> Any:
        """Let a member answer; one that cannot has left, with its reason."""
        try:
            return self.up(client, make(), step)
        except UpdateError as error:
            self.left[client] = str(error)
            return None


def _shares(plan: MaskedRules, weighting: Weighting, clients: Sequence[int]) -> dict[int, float]:
    """Return each client's share of the cohort's weights, by what is known of it before the round."""
    match weighting:
        case Weighting.ROWS:
            weights = {k: float(plan.asked(k).num_rows) for k in clients}
        case Weighting.WORK:
            weights = {k: float(plan.asked(k).work) for k in clients}
        case _:
            weights = dict.fromkeys(clients, 1.0)
    return normalised(capped(weights, plan.max_weight))


def _numbers(
    update: Update, broadcast: Broadcast, work: Work, plan: MaskedRules, strategy: MaskedSums, share: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what a client adds to the sum, after the checks that a server makes where it sees updates.

    Raises:
        UpdateError: the update is none that could be used.
    """
    check_update(update, broadcast, work, plan.shapes, plan.asked(update.client))
    start = broadcast.trained
    assert isinstance(start, Adapter)
    found = strategy.rule.summand(start, update.adapter, share)
    return torch.cat([found[key].flatten() for key in strategy.sizes()]).numpy()


def _by_name(numbers: np.ndarray[Any, np.dtype[np.float64]], strategy: MaskedSums) -> dict[str, Tensor]:
    found, rest = {}, torch.from_numpy(numbers)
    for key, shape in strategy.sizes().items():
        size = shape[0] * shape[1]
        found[key], rest = rest[:size].view(shape), rest[size:]
    return found
