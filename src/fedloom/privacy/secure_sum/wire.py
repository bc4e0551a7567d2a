"""The messages of a secure sum as bytes, and what is checked before one is believed.

All begin with ``FLS1``, a byte for the kind, and the session's context of 32 bytes. Whole numbers are big-endian; the
masked words are little-endian. Sizes follow from the session, so a message of another length is refused unread.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.errors import UpdateError
from fedloom.privacy.secure_sum.fixed_point import WORD_BYTES, Ring
from fedloom.privacy.secure_sum.keys import KEY_BYTES, TAG_BYTES
from fedloom.privacy.secure_sum.shares import SHARE_BYTES

KEYS, ROSTER, SHARES, DELIVERY, MASKED, SURVIVORS, UNMASKING, AGREEMENT, AGREEMENTS = range(1, 10)
_NAMES = (
    *("", "keys", "roster", "shares", "delivery", "masked numbers", "survivors", "unmasking"),
    *("agreement", "agreements"),
)
_BEGIN = b"FLS1"
CONTEXT_BYTES = 32
_HEAD_BYTES = len(_BEGIN) + 1 + CONTEXT_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
MAX_SIGNATURE_BYTES = 8192
"""Of a signature with the certificate that it is of, where it has one."""
_FEWEST, _MOST = 3, 1 << 32


@dataclass(frozen=True)
class Session:
    """One sum: what all who take part know before it begins.

    Attributes:
        context: names the sum, e.g. by its run and round; :func:`context_of` makes it.
        members: those who may take part, ascending.
        threshold: how many must stay to the end.
        length: numbers of a member.

    Raises:
        ValueError: the members are too few or not ascending, or the threshold does not fit them.
    """

    context: bytes
    members: tuple[int, ...]
    threshold: int
    length: int

    def __post_init__(self) -> None:
        n, t = len(self.members), self.threshold
        is_listed = list(self.members) == sorted(set(self.members))
        if n < _FEWEST or not is_listed or min(self.members) < 0 or max(self.members) >= _MOST:
            raise ValueError(f"expected {_FEWEST} or more members, ascending, got {self.members}; draw more")
        if not n < 2 * t <= 2 * n:
            raise ValueError(f"expected a threshold above half of {n} members and at most {n}, got {t}; change it")
        if len(self.context) != CONTEXT_BYTES:
            raise ValueError(f"expected a context of {CONTEXT_BYTES} bytes, got {len(self.context)}")

    def place(self, member: int) -> int:
        """Return a member's number among all, from 1: where its shares lie."""
        return self.members.index(member) + 1


def context_of(*parts: object) -> bytes:
    """Return the context that parts name."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()


@dataclass(frozen=True)
class PublicKeys:
    """A member's two public keys, for envelopes and for masks, and its signature of them."""

    envelopes: bytes
    masks: bytes
    signature: bytes = b""


def signed_text(session: Session, member: int, keys: PublicKeys) -> bytes:
    """Return what a member signs of its keys."""
    return _begin(KEYS, session) + _number(member) + keys.envelopes + keys.masks


def keys_written(session: Session, member: int, keys: PublicKeys) -> bytes:
    """Return a member's keys as a message."""
    return _begin(KEYS, session) + _keys_entry(member, keys)


def keys_read(message: bytes, session: Session, member: int) -> PublicKeys:
    """Read a member's keys.

    Raises:
        UpdateError: the message is another.
    """
    reader = _Reader(message, KEYS, session)
    found = _read_entry(reader)
    reader.finish()
    _check(found[0] == member, KEYS, f"of member {member}", f"of member {found[0]}")
    return found[1]


def roster_written(session: Session, keys: Mapping[int, PublicKeys]) -> bytes:
    """Return all keys as a message."""
    entries = b"".join(_keys_entry(member, keys[member]) for member in sorted(keys))
    return _begin(ROSTER, session) + _number(len(keys)) + entries


def roster_read(message: bytes, session: Session) -> dict[int, PublicKeys]:
    """Read all keys: of members only, each once, no key twice, enough of them.

    Raises:
        UpdateError: the message is another.
    """
    reader = _Reader(message, ROSTER, session)
    entries = [_read_entry(reader) for _ in range(reader.count(session))]
    reader.finish()
    _check_members([member for member, _ in entries], session, ROSTER)
    known = [key for _, own in entries for key in (own.envelopes, own.masks)]
    _check(len(set(known)) == len(known), ROSTER, "with a key for each", "with one key twice")
    return dict(entries)


def envelopes_written(kind: int, session: Session, owner: int, envelopes: Mapping[int, bytes]) -> bytes:
    """Return sealed shares of one member for the others, or of the others for one member, as a message."""
    entries = b"".join(_number(other) + envelopes[other] for other in sorted(envelopes))
    return _begin(kind, session) + _number(owner) + _number(len(envelopes)) + entries


def envelopes_read(kind: int, message: bytes, session: Session, owner: int) -> dict[int, bytes]:
    """Read :func:`envelopes_written`.

    Raises:
        UpdateError: the message is another.
    """
    reader = _Reader(message, kind, session)
    _check(reader.number() == owner, kind, f"of member {owner}", "of another member")
    entries = [(reader.number(), reader.take(SEALED_BYTES)) for _ in range(reader.count(session))]
    reader.finish()
    others = [other for other, _ in entries]
    _check(others == sorted(set(others) & (set(session.members) - {owner})), kind, "of other members", "of others")
    return dict(entries)


def masked_written(session: Session, member: int, words: Ring) -> bytes:
    """Return a member's masked numbers as a message."""
    return _begin(MASKED, session) + _number(member) + words.astype("<u8").tobytes()


def masked_read(message: bytes, session: Session, member: int) -> Ring:
    """Read a member's masked numbers.

    Raises:
        UpdateError: the message is another, or of another length.
    """
    reader = _Reader(message, MASKED, session)
    _check(reader.number() == member, MASKED, f"of member {member}", "of another member")
    words = reader.take(WORD_BYTES * session.length)
    reader.finish()
    return np.frombuffer(words, "<u8").astype(np.uint64)


def survivors_written(session: Session, members: Iterable[int]) -> bytes:
    """Return those whose numbers are in the sum, as a message."""
    found = sorted(members)
    return _begin(SURVIVORS, session) + _number(len(found)) + b"".join(map(_number, found))


def survivors_read(message: bytes, session: Session) -> tuple[int, ...]:
    """Read those whose numbers are in the sum.

    Raises:
        UpdateError: the message is another, or they are too few.
    """
    reader = _Reader(message, SURVIVORS, session)
    found = [reader.number() for _ in range(reader.count(session))]
    reader.finish()
    _check_members(found, session, SURVIVORS)
    return tuple(found)


def agreement_written(session: Session, member: int, signature: bytes) -> bytes:
    """Return a member's signature of the list of those whose numbers are in the sum, as a message."""
    return _begin(AGREEMENT, session) + _signature_entry(member, signature)


def agreement_read(message: bytes, session: Session, member: int) -> bytes:
    """Read a member's signature.

    Raises:
        UpdateError: the message is another.
    """
    reader = _Reader(message, AGREEMENT, session)
    signer, signature = reader.number(), _read_signature(reader)
    reader.finish()
    _check(signer == member, AGREEMENT, f"of member {member}", f"of member {signer}")
    return signature


def agreements_written(session: Session, signatures: Mapping[int, bytes]) -> bytes:
    """Return the signatures of all who signed, as a message."""
    entries = b"".join(_signature_entry(member, signatures[member]) for member in sorted(signatures))
    return _begin(AGREEMENTS, session) + _number(len(signatures)) + entries


def agreements_read(message: bytes, session: Session) -> dict[int, bytes]:
    """Read signatures: of members only, each once, enough of them.

    Raises:
        UpdateError: the message is another.
    """
    reader = _Reader(message, AGREEMENTS, session)
    entries = [(reader.number(), _read_signature(reader)) for _ in range(reader.count(session))]
    reader.finish()
    _check_members([member for member, _ in entries], session, AGREEMENTS)
    return dict(entries)


@dataclass(frozen=True)
class Told:
    """What a member tells to take masks off: its shares of the own seeds of those who stayed, of others' keys."""

    seeds: Mapping[int, bytes]
    keys: Mapping[int, bytes]


def told_written(session: Session, member: int, told: Told) -> bytes:
    """Return shares as a message."""
    parts = [_number(member)]
    for shares in (told.seeds, told.keys):
        parts += [_number(len(shares)), *(_number(other) + shares[other] for other in sorted(shares))]
    return _begin(UNMASKING, session) + b"".join(parts)


def told_read(message: bytes, session: Session, member: int) -> Told:
    """Read the shares that a member tells.

    Raises:
        UpdateError: the message is another.
    """
    reader = _Reader(message, UNMASKING, session)
    _check(reader.number() == member, UNMASKING, f"of member {member}", "of another member")
    both = [
        [(reader.number(), reader.take(SHARE_BYTES)) for _ in range(reader.count(session))] for _ in ("seeds", "keys")
    ]
    reader.finish()
    about = [other for shares in both for other, _ in shares]
    _check(len(set(about)) == len(about), UNMASKING, "with one share of each", "with two of one")
    return Told(dict(both[0]), dict(both[1]))


def bytes_of_member(num_members: int, length: int, signature: int) -> tuple[int, int]:
    """Return the bytes that a member sends and is sent in a sum where nobody leaves, with signatures of that size."""
    entry, others = 4 + 2 * KEY_BYTES + 2 + signature, (num_members - 1) * (4 + SEALED_BYTES)
    envelopes, told = _HEAD_BYTES + 8 + others, _HEAD_BYTES + 12 + num_members * (4 + SHARE_BYTES)
    agreement = 4 + 2 + signature
    up = (_HEAD_BYTES + entry) + envelopes + (_HEAD_BYTES + 4 + WORD_BYTES * length) + (_HEAD_BYTES + agreement) + told
    down = (_HEAD_BYTES + 4 + num_members * entry) + envelopes + (_HEAD_BYTES + 4 + 4 * num_members)
    return up, down + _HEAD_BYTES + 4 + num_members * agreement


def _begin(kind: int, session: Session) -> bytes:
    return _BEGIN + bytes([kind]) + session.context


def _number(value: int) -> bytes:
    return struct.pack(">I", value)


def _keys_entry(member: int, keys: PublicKeys) -> bytes:
    return _number(member) + keys.envelopes + keys.masks + _sized(keys.signature)


def _signature_entry(member: int, signature: bytes) -> bytes:
    return _number(member) + _sized(signature)


def _sized(signature: bytes) -> bytes:
    return struct.pack(">H", len(signature)) + signature


def _read_entry(reader: _Reader) -> tuple[int, PublicKeys]:
    member, envelopes, masks = reader.number(), reader.take(KEY_BYTES), reader.take(KEY_BYTES)
    return member, PublicKeys(envelopes, masks, _read_signature(reader))


def _read_signature(reader: _Reader) -> bytes:
    (length,) = struct.unpack(">H", reader.take(2))
    _check(length <= MAX_SIGNATURE_BYTES, reader.kind, "with a signature", f"with one of {length} bytes")
    return reader.take(length)


def _check_members(found: Sequence[int], session: Session, kind: int) -> None:
    known = list(found) == sorted(set(found) & set(session.members))
    _check(known, kind, "of members of the sum, each once", "of others")
    _check(len(found) >= session.threshold, kind, f"of at least {session.threshold} members", f"of {len(found)}")


def _check(is_right: bool, kind: int, wanted: str, got: str) -> None:
    if not is_right:
        raise UpdateError(
            f"secure sum: expected a message of {_NAMES[kind]} {wanted}, got one {got}; leave its sender out"
        )


class _Reader:
    """A message that is read from its begin to its end, and no further."""

    def __init__(self, message: bytes, kind: int, session: Session) -> None:
        self._rest, self.kind = memoryview(message), kind
        _check(bytes(message[:_HEAD_BYTES]) == _begin(kind, session), kind, "of this sum", "of another kind or sum")
        self._rest = self._rest[_HEAD_BYTES:]

    def take(self, length: int) -> bytes:
        _check(len(self._rest) >= length, self.kind, "of its whole length", "that is cut off")
        found, self._rest = bytes(self._rest[:length]), self._rest[length:]
        return found

    def number(self) -> int:
        (found,) = struct.unpack(">I", self.take(4))
        return int(found)

    def count(self, session: Session) -> int:
        found = self.number()
        _check(found <= len(session.members), self.kind, "of members of the sum", f"of {found}")
        return found

    def finish(self) -> None:
        _check(len(self._rest) == 0, self.kind, "of its own length", "with more behind it")
