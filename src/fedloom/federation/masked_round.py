"""A round whose server sees the clients' sum and no update: a secure sum after their training.

Clients train first; those who have trained put their numbers under masks and add them up by the messages of
:mod:`fedloom.privacy.secure_sum`. Across sites the messages go over the link (``Masking.ask``). In one process or on a
cluster it is a simulation: what a client does with its own update is done between its arrival and its masked message.
Masks are drawn from the operating system; they cancel, so the result repeats.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import TooFewClientsError, UpdateError
from fedloom.federation.intake import Arrival, ClientRecord, advice_after
from fedloom.federation.sum_terms import FEWEST_MEMBERS, SumTerms, numbers_added, shares_told, threshold_of
from fedloom.federation.update_checks import Asked, check_update
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Work
from fedloom.methods.masked_sums import MaskedSums, Numbers
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.methods.strategy import Weighting
from fedloom.privacy.secure_sum.fixed_point import Ring, from_ring, to_ring
from fedloom.privacy.secure_sum.identities import Verify, local_identities
from fedloom.privacy.secure_sum.steps import Answers, Ask, Member, Step, secure_sum
from fedloom.privacy.secure_sum.wire import Session
from fedloom.training.stats import TrainingStats

_TOKEN_BYTES = 16


@dataclass(frozen=True)
class Masking:
    """How sums are masked.

    Attributes:
        threshold: the clients that must stay; None: more than two thirds.
        run: what names the run.
        ask: hands members of a sum of these terms their messages; None: they are of this process.
        verify: tells whose signature is whose; None with members of this process.
    """

    threshold: int | None
    run: str
    ask: Callable[[SumTerms], Ask] | None = None
    verify: Verify | None = None


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

    @property
    def masking(self) -> Masking | None:
        """How the sum is masked."""
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


def masked_round(
    plan: MaskedRules,
    strategy: MaskedSums,
    work: Work,
    broadcasts: Sequence[Broadcast],
    arrivals: Iterator[Arrival],
) -> MaskedRound:
    """Run a round's secure sum once the clients have trained, which begins with the first arrival asked for.

    Raises:
        TooFewClientsError: fewer clients stayed than the threshold, or than ``plan.min_clients``, or they are too few
            for a sum that hides one.
    """
    masking = plan.masking
    assert masking is not None
    sent = {broadcast.client: broadcast for broadcast in broadcasts}
    asked_for = _terms(masking, tuple(sorted(sent)), broadcasts[0].round)
    _session(asked_for, strategy)  # before anybody trains for nothing
    arrived = _Arrived.of(arrivals, sent)
    present = tuple(sorted(arrived.updates))
    weights = _weights(plan, strategy.weighting, present)
    terms = _with_shares(asked_for, weights, plan.max_weight)
    session = _session(terms, strategy)
    if masking.ask is None:

        def numbers(client: int) -> Ring:
            update, broadcast = arrived.updates.pop(client), sent[client]
            check_update(update, broadcast, work, plan.shapes, plan.asked(client))
            start = broadcast.trained if isinstance(broadcast.trained, Adapter) else Adapter()
            share, noise = terms.share(weights[client]), strategy.rule.noise_share(start, terms.round, client)
            added = numbers_added(strategy, broadcast.round, start, update.adapter, share, noise)
            return to_ring(added, len(session.members))

        ask, verify = _here(session, present, numbers)
    else:
        assert masking.verify is not None
        ask, verify = masking.ask(terms), masking.verify
    opened = secure_sum(session, present, ask, verify, arrived.left)
    records = []
    for k in session.members:
        is_in = k in opened.members
        stats = TrainingStats(plan.asked(k).num_rows) if is_in else None
        down, up = arrived.bytes_down.get(k, 0) + opened.bytes_down.get(k, 0), opened.bytes_up.get(k, 0)
        reason = None if is_in else opened.left.get(k)
        records.append(ClientRecord(k, reason, down, up, stats, session.length if is_in else 0))
    if len(opened.members) < plan.min_clients:
        reasons = "; ".join(f"client {one.client}: {one.reason}" for one in records if one.reason is not None)
        raise TooFewClientsError(
            f"expected at least {plan.min_clients} clients in the sum (federation.min_clients), got "
            f"{len(opened.members)} ({reasons}); mend the cause and run again"
        )
    in_sum = {k: terms.share(weights[k]) for k in opened.members}
    return MaskedRound(_by_name(from_ring(opened.words), strategy), in_sum, arrived.held, tuple(records))


@dataclass(eq=False)
class _Arrived:
    """Who has trained, and why others have not; an update is there where it is of this process."""

    updates: dict[int, Update] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, arrivals: Iterator[Arrival], sent: Mapping[int, Broadcast]) -> _Arrived:
        """Take the first arrival of each client that was asked."""
        found = cls()
        for arrival in arrivals:
            outcome, client = arrival.outcome, arrival.outcome.client
            if client not in sent or client in found.bytes_down:
                continue
            found.bytes_down[client] = arrival.download_bytes
            if outcome.held is not None and 0 <= outcome.held <= sent[client].news.version:
                found.held[client] = outcome.held
            if isinstance(outcome, Failure):
                found.left[client] = str(outcome.reason)
            else:
                found.updates[client] = outcome
        return found


def _terms(masking: Masking, members: tuple[int, ...], round: int) -> SumTerms:
    threshold, token = threshold_of(masking.threshold, len(members)), secrets.token_hex(_TOKEN_BYTES)
    return SumTerms(masking.run, round, token, members, threshold, 1.0, 1.0)


def _with_shares(terms: SumTerms, weights: Mapping[int, float], max_weight: float) -> SumTerms:
    """Return the terms with the shares of those who have trained."""
    if not weights:
        return terms
    unit, largest = shares_told(weights, max_weight)
    return replace(terms, unit_share=unit, largest_share=largest)


def _session(terms: SumTerms, strategy: MaskedSums) -> Session:
    """Return the session of a round's sum.

    Raises:
        TooFewClientsError: the clients are too few for a sum that hides one, or for the threshold.
    """
    try:
        return terms.session(strategy)
    except ValueError as error:
        raise TooFewClientsError(
            f"round {terms.round}: expected at least {FEWEST_MEMBERS} clients for a secure sum (privacy.sum), of whom "
            f"{terms.threshold} stay, got {len(terms.members)}; {advice_after(terms.round - 1)}"
        ) from error


def _here(session: Session, present: Sequence[int], numbers: Callable[[int], Ring]) -> tuple[Ask, Verify]:
    """Return members of this process: one that cannot answer has left, with its reason."""
    identities = local_identities(session.members)

    def numbers_of(client: int) -> Callable[[], Ring]:
        return lambda: numbers(client)

    members = {k: Member(session, k, identities[k], numbers_of(k)) for k in present}

    def ask(step: Step, messages: Mapping[int, bytes]) -> Answers:
        found, left = dict[int, bytes](), dict[int, str]()
        for client, message in messages.items():
            try:
                found[client] = members[client].answer(step, message)
            except UpdateError as error:
                left[client] = str(error)
        return Answers(found, left)

    return ask, identities[session.members[0]].verify


def _weights(plan: MaskedRules, weighting: Weighting, clients: Sequence[int]) -> dict[int, float]:
    """Return each client's weight, by what is known of it before the round."""
    match weighting:
        case Weighting.ROWS:
            return {k: float(plan.asked(k).num_rows) for k in clients}
        case Weighting.WORK:
            return {k: float(plan.asked(k).work) for k in clients}
        case _:
            return dict.fromkeys(clients, 1.0)


def _by_name(numbers: np.ndarray[Any, np.dtype[np.float64]], strategy: MaskedSums) -> dict[str, Tensor]:
    found, rest = {}, torch.from_numpy(numbers)
    for key, shape in strategy.sizes().items():
        size = shape[0] * shape[1]
        found[key], rest = rest[:size].view(shape), rest[size:]
    return found
