"""The server's part of a secure sum: it passes messages on, adds masked numbers up, and takes off what is left.

Each step takes the messages that came, by member; who is missing has left. What cannot be read counts as missing, with
the reason. Below the threshold a step ends the sum: nothing of any member's numbers is known then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fedloom.errors import TooFewClientsError, UpdateError
from fedloom.privacy.secure_sum import keys, wire
from fedloom.privacy.secure_sum.fixed_point import Ring
from fedloom.privacy.secure_sum.identities import Verify
from fedloom.privacy.secure_sum.masks import mask
from fedloom.privacy.secure_sum.member import pair_mask
from fedloom.privacy.secure_sum.shares import secret_of
from fedloom.privacy.secure_sum.wire import PublicKeys, Session

T = TypeVar("T")
Messages = Mapping[int, bytes]
Reasons = Mapping[int, str]
"""Why members left, where they said so."""
NOBODY: Reasons = {}


@dataclass(frozen=True)
class Roster:
    """Those who sent keys; ``left`` says of the others why they are out, as in the steps that follow."""

    session: Session
    known: Mapping[int, PublicKeys]
    left: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Delivered:
    """Those who shared their secrets among the roster."""

    roster: Roster
    members: frozenset[int]
    left: Mapping[int, str]


@dataclass(frozen=True, eq=False)
class Summed:
    """The sum of the masked numbers of those who sent them, masks on."""

    delivered: Delivered
    members: tuple[int, ...]
    words: Ring
    left: Mapping[int, str]


@dataclass(frozen=True, eq=False)
class Agreed:
    """The sum, and those who signed who is in it."""

    summed: Summed
    members: tuple[int, ...]
    left: Mapping[int, str]


def roster(session: Session, messages: Messages, verify: Verify, why: Reasons = NOBODY) -> tuple[Roster, bytes]:
    """Gather keys, and return what all are sent: who did not sign its keys would make all others refuse.

    Raises:
        TooFewClientsError: fewer came than the threshold.
    """

    def read(message: bytes, member: int) -> PublicKeys:
        found = wire.keys_read(message, session, member)
        if not verify(member, wire.signed_text(session, member, found), found.signature):
            raise UpdateError(f"secure sum: expected keys that member {member} signed, got others; leave it out")
        return found

    known, left = _read(session, session.members, messages, read, why)
    return Roster(session, known, left), wire.roster_written(session, known)


def delivered(before: Roster, messages: Messages, why: Reasons = NOBODY) -> tuple[Delivered, dict[int, bytes]]:
    """Gather sealed shares, and return what each who sent some is sent: those for it.

    Raises:
        TooFewClientsError: fewer came than the threshold.
    """
    session = before.session

    def read(message: bytes, member: int) -> dict[int, bytes]:
        found = wire.envelopes_read(wire.SHARES, message, session, member)
        if found.keys() != before.known.keys() - {member}:
            raise UpdateError("secure sum: expected shares for all others of the roster, got some; leave it out")
        return found

    shares, left = _read(session, before.known, messages, read, {**before.left, **why})
    posted = {
        member: wire.envelopes_written(
            wire.DELIVERY, session, member, {other: shares[other][member] for other in shares if other != member}
        )
        for member in shares
    }
    return Delivered(before, frozenset(shares), left), posted


def summed(before: Delivered, messages: Messages, why: Reasons = NOBODY) -> tuple[Summed, bytes]:
    """Add up masked numbers, and return what all who sent some are sent: who did.

    Raises:
        TooFewClientsError: fewer came than the threshold.
    """
    session, total = before.roster.session, np.zeros(before.roster.session.length, np.uint64)

    def read(message: bytes, member: int) -> int:
        np.add(total, wire.masked_read(message, session, member), out=total)
        return member

    came, left = _read(session, before.members, messages, read, {**before.left, **why})
    stayed = tuple(sorted(came))
    return Summed(before, stayed, total, left), wire.survivors_written(session, stayed)


def agreed(before: Summed, messages: Messages, why: Reasons = NOBODY) -> tuple[Agreed, bytes]:
    """Gather signatures of the list of survivors, and return what all who signed are sent: all of them.

    Raises:
        TooFewClientsError: fewer came than the threshold.
    """
    session = before.delivered.roster.session
    signatures, left = _read(
        session,
        before.members,
        messages,
        lambda m, k: wire.agreement_read(m, session, k),
        {**before.left, **why},
    )
    return Agreed(before, tuple(sorted(signatures)), left), wire.agreements_written(session, signatures)


def unmasked(before: Agreed, messages: Messages, why: Reasons = NOBODY) -> Ring:
    """Return the sum of the numbers of its members: their own masks off, and those towards whoever left.

    A wrong share is found where more members than the threshold answer, and left out with all that its member told
    where two more do. Of exactly as many as the threshold one can spoil the sum, as it can by sending other numbers.

    Raises:
        TooFewClientsError: fewer came than the threshold.
        UpdateError: the shares are not of one secret, or give another key than was sent.
    """
    summed, delivered = before.summed, before.summed.delivered
    session, known = delivered.roster.session, delivered.roster.known
    stayed, gone = set(summed.members), delivered.members - set(summed.members)

    def read(message: bytes, member: int) -> wire.Told:
        found = wire.told_read(message, session, member)
        if found.seeds.keys() != stayed or found.keys.keys() != gone:
            raise UpdateError("secure sum: expected a share of one secret of each, got others; leave it out")
        return found

    told, _ = _read(session, before.members, messages, read, {**before.left, **why})
    seeds, private_keys = _secrets(before, told)
    total = summed.words.copy()
    for member in sorted(stayed):
        total -= mask(seeds[member], session.length)
    for member in sorted(gone):
        for other in stayed:  # as ``other`` put it on
            between = pair_mask(private_keys[member], known[other].masks, session)
            total = total - between if other < member else total + between
    return total


def _secrets(before: Agreed, told: Mapping[int, wire.Told]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Return the seeds of those who stayed and the keys of those who left, by shares that fit each other."""
    session = before.summed.delivered.roster.session
    try:
        return _secrets_of(before, told)
    except UpdateError:
        # Without one wrong member the others fit; without one right member the wrong one still does not.
        for member in told if len(told) > session.threshold + 1 else ():
            with suppress(UpdateError):
                return _secrets_of(before, {other: one for other, one in told.items() if other != member})
        raise


def _secrets_of(before: Agreed, told: Mapping[int, wire.Told]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    summed, delivered = before.summed, before.summed.delivered
    session, known = delivered.roster.session, delivered.roster.known
    seeds, private_keys = dict[int, bytes](), dict[int, bytes]()
    for member in summed.members:
        shares = {session.place(one): found.seeds[member] for one, found in told.items()}
        seeds[member] = secret_of(shares, session.threshold)
    for member in sorted(delivered.members - set(summed.members)):
        shares = {session.place(one): found.keys[member] for one, found in told.items()}
        private_keys[member] = secret_of(shares, session.threshold)
        if keys.public_of(private_keys[member]) != known[member].masks:
            raise UpdateError(f"secure sum: expected shares of the key of member {member}, got others; start a new sum")
    return seeds, private_keys


def _read(
    session: Session,
    expected: Mapping[int, object] | frozenset[int] | tuple[int, ...],
    messages: Messages,
    read: Callable[[bytes, int], T],
    left: Mapping[int, str],
) -> tuple[dict[int, T], dict[int, str]]:
    """Return what could be read, and why others are out."""
    found, out = dict[int, T](), dict(left)
    for member in sorted(expected):
        try:
            if member in messages:
                found[member] = read(messages[member], member)
            else:
                out.setdefault(member, "left the secure sum")
        except UpdateError as error:
            out[member] = str(error)
    if len(found) < session.threshold:
        reasons = "; ".join(f"client {member}: {out[member]}" for member in sorted(out))
        raise TooFewClientsError(
            f"secure sum: expected at least {session.threshold} of {len(session.members)} clients (privacy.threshold), "
            f"got {len(found)} ({reasons}); run again to repeat the round, of which no numbers are known"
        )
    return found, out
