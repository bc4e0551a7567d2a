"""A member's part of a secure sum: five answers, each made from what it knew before and one message of the server.

Functions change nothing; what a member knows is handed on from one to the next. It answers each step of a session once
and forgets it afterwards (:mod:`.steps`): whoever signed two lists could help to open two sums that differ by one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.errors import UpdateError
from fedloom.privacy.secure_sum import keys, wire
from fedloom.privacy.secure_sum.fixed_point import Ring
from fedloom.privacy.secure_sum.identities import Sign, Verify
from fedloom.privacy.secure_sum.keys import KEY_BYTES, Entropy
from fedloom.privacy.secure_sum.masks import SEED_BYTES, mask
from fedloom.privacy.secure_sum.shares import SHARE_BYTES, shares_of
from fedloom.privacy.secure_sum.wire import PublicKeys, Session, Told

_ENVELOPES, _MASKS = b"envelopes", b"masks"


@dataclass(frozen=True)
class Keyed:
    """A member that has made its keys."""

    session: Session
    member: int
    envelopes: bytes = field(repr=False)
    masks: bytes = field(repr=False)


@dataclass(frozen=True)
class Shared:
    """A member that has shared its secrets among those of the roster."""

    keyed: Keyed
    roster: Mapping[int, PublicKeys]
    seed: bytes = field(repr=False)
    own: tuple[bytes, bytes] = field(repr=False)


@dataclass(frozen=True)
class Masked:
    """A member that has sent its masked numbers; it holds the shares of those who had shared before."""

    shared: Shared
    shares: Mapping[int, tuple[bytes, bytes]] = field(repr=False)


@dataclass(frozen=True)
class Agreed:
    """A member that has signed who is in the sum."""

    masked: Masked
    stayed: tuple[int, ...]


def begin(session: Session, member: int, sign: Sign, *, entropy: Entropy = os.urandom) -> tuple[Keyed, bytes]:
    """Make the keys of a session, and return the first message: the public ones, signed."""
    keyed = Keyed(session, member, entropy(KEY_BYTES), entropy(KEY_BYTES))
    public = PublicKeys(keys.public_of(keyed.envelopes), keys.public_of(keyed.masks))
    signature = sign(wire.signed_text(session, member, public))
    return keyed, wire.keys_written(session, member, PublicKeys(public.envelopes, public.masks, signature))


def shared(keyed: Keyed, roster: bytes, verify: Verify, *, entropy: Entropy = os.urandom) -> tuple[Shared, bytes]:
    """Draw the own seed, share it and the key of the masks among the roster, and return the second message.

    Raises:
        UpdateError: the roster is damaged, too short, lacks this member, or has a key that its member did not sign.
    """
    session, me = keyed.session, keyed.member
    known = wire.roster_read(roster, session)
    own = known.get(me)
    if own is None or (own.envelopes, own.masks) != (keys.public_of(keyed.envelopes), keys.public_of(keyed.masks)):
        raise UpdateError(f"secure sum: expected a roster with the keys of member {me}, got another; start a new sum")
    for member, public in known.items():
        if not verify(member, wire.signed_text(session, member, public), public.signature):
            raise UpdateError(
                f"secure sum: expected keys that member {member} signed, got others; the server or the network changed "
                "them: take no part"
            )
    seed, n, t = entropy(SEED_BYTES), len(session.members), session.threshold
    of_key, of_seed = (shares_of(secret, n, t, entropy) for secret in (keyed.masks, seed))
    places = {member: session.place(member) - 1 for member in known}
    envelopes = {}
    for member, public in known.items():
        if member != me:
            key = keys.agreed(keyed.envelopes, public.envelopes, _ENVELOPES, session.context)
            text = of_key[places[member]] + of_seed[places[member]]
            envelopes[member] = keys.sealed(key, me, member, session.context, text)
    mine = of_key[places[me]], of_seed[places[me]]
    return Shared(keyed, known, seed, mine), wire.envelopes_written(wire.SHARES, session, me, envelopes)


def masked(before: Shared, delivery: bytes, words: Ring) -> tuple[Masked, bytes]:
    """Put on the masks shared with everybody who delivered, and return the third message.

    Raises:
        UpdateError: the delivery is damaged, or of too few.
    """
    keyed, session, me = before.keyed, before.keyed.session, before.keyed.member
    if len(words) != session.length:
        raise ValueError(f"expected {session.length} numbers, got {len(words)}")
    envelopes = wire.envelopes_read(wire.DELIVERY, delivery, session, me)
    if len(envelopes) + 1 < session.threshold or not envelopes.keys() <= before.roster.keys():
        raise UpdateError(
            f"secure sum: expected shares of at least {session.threshold - 1} others of the roster, got "
            f"{len(envelopes)}; start a new sum"
        )
    held, hidden = {me: before.own}, words + mask(before.seed, session.length)
    for other, envelope in envelopes.items():
        public = before.roster[other]
        key = keys.agreed(keyed.envelopes, public.envelopes, _ENVELOPES, session.context)
        text = keys.opened(key, other, me, session.context, envelope)
        held[other] = text[:SHARE_BYTES], text[SHARE_BYTES:]
        between = mask(keys.agreed(keyed.masks, public.masks, _MASKS, session.context), session.length)
        hidden = hidden + between if me < other else hidden - between
    return Masked(before, held), wire.masked_written(session, me, hidden)


def agreed(before: Masked, survivors: bytes, sign: Sign) -> tuple[Agreed, bytes]:
    """Return the fourth message: a signature of the list of those whose numbers came.

    Raises:
        UpdateError: the list is damaged or too short, names somebody who shared nothing, or lacks this member.
    """
    keyed = before.shared.keyed
    stayed = wire.survivors_read(survivors, keyed.session)
    if keyed.member not in stayed or not set(stayed) <= before.shares.keys():
        raise UpdateError(
            f"secure sum: expected survivors among those who shared, with member {keyed.member}, got others; keep "
            "the shares"
        )
    signature = sign(wire.survivors_written(keyed.session, stayed))
    return Agreed(before, stayed), wire.agreement_written(keyed.session, keyed.member, signature)


def told(before: Agreed, agreements: bytes, verify: Verify) -> bytes:
    """Return the fifth message: shares of the seeds of those whose numbers came, and of the keys of the others.

    Raises:
        UpdateError: the message is damaged, or fewer members than the threshold have signed the list that this one was
            given.
    """
    keyed, stayed = before.masked.shared.keyed, before.stayed
    session, text = keyed.session, wire.survivors_written(keyed.session, stayed)
    given = wire.agreements_read(agreements, session)
    signed = sum(member in stayed and verify(member, text, signature) for member, signature in given.items())
    if signed < session.threshold:
        raise UpdateError(
            f"secure sum: expected at least {session.threshold} members to have signed the same list of survivors, got "
            f"{signed}: the server told others another list; keep the shares"
        )
    shares = before.masked.shares
    seeds = {other: of_seed for other, (_, of_seed) in shares.items() if other in stayed}
    of_keys = {other: of_key for other, (of_key, _) in shares.items() if other not in stayed}
    return wire.told_written(session, keyed.member, Told(seeds, of_keys))


def pair_mask(private: bytes, public: bytes, session: Session) -> Ring:
    """Return the mask between the owner of a private key and that of a public one."""
    return mask(keys.agreed(private, public, _MASKS, session.context), session.length)
