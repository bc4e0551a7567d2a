"""The order of a secure sum, for both sides: what a member answers when, and what the server does with the answers.

    step      the server sends              a member answers
    keys      nothing                       its public keys, signed
    shares    all keys                      sealed shares of its secrets
    masked    the shares that are for it    its numbers, masked
    agreed    whose numbers came            a signature of that list
    told      all signatures                shares of what must be taken off

How messages get from one side to the other is :data:`Ask`'s: in one process a call, across sites a link.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any

from fedloom.errors import UpdateError
from fedloom.privacy.secure_sum import member, server, wire
from fedloom.privacy.secure_sum.fixed_point import Ring
from fedloom.privacy.secure_sum.identities import Identity, Verify
from fedloom.privacy.secure_sum.keys import Entropy
from fedloom.privacy.secure_sum.server import NOBODY, Messages, Reasons
from fedloom.privacy.secure_sum.wire import Session


class Step(StrEnum):
    """A step of a sum: one message of the server, and one answer."""

    KEYS = "keys"
    SHARES = "shares"
    MASKED = "masked"
    AGREED = "agreed"
    TOLD = "told"


ORDER = tuple(Step)


def _promise_nothing(members: tuple[int, ...]) -> None:
    """Take any list: nothing of this round was ever in another sum."""


class Member:
    """One member's part: it answers each step once and in order, and is out for good where it cannot.

    Its secrets are in memory alone: who ends within a sum has left it, and never masks with them again.
    """

    def __init__(
        self,
        session: Session,
        number: int,
        identity: Identity,
        numbers: Callable[[], Ring],
        *,
        promise: Callable[[tuple[int, ...]], None] = _promise_nothing,
        entropy: Entropy = os.urandom,
    ) -> None:
        """Take part in a session; ``numbers`` are asked for once.

        ``promise`` is told who is in the sum before the list is signed, and raises where it may not be.
        """
        self.session, self.number = session, number
        self._identity, self._numbers, self._promise, self._entropy = identity, numbers, promise, entropy
        self._knows: Any = None
        self._done: list[Step] = []
        self._last = (b"", b"")
        self._is_out = False

    def answer(self, step: Step, message: bytes) -> bytes:
        """Answer a message; the last one that was answered gets the same answer again.

        Raises:
            UpdateError: the message is damaged, of another step, or one that this member may not answer.
        """
        asked = sha256(message).digest()
        if self._done and step is self._done[-1] and asked == self._last[0] and not self._is_out:
            return self._last[1]
        if self._is_out or len(self._done) == len(ORDER) or step is not ORDER[len(self._done)]:
            wanted = "none" if self._is_out else ", ".join(ORDER[len(self._done) :][:1]) or "none"
            raise UpdateError(f"secure sum: expected a message of step {wanted}, got one of {step}; start a new sum")
        self._is_out = True  # until the answer is made
        self._knows, found = self._next(step, message)
        self._done.append(step)
        self._last, self._is_out = (asked, found), False
        return found

    def _next(self, step: Step, message: bytes) -> tuple[Any, bytes]:
        knows, identity = self._knows, self._identity
        match step:
            case Step.KEYS:
                return member.begin(self.session, self.number, identity.sign, entropy=self._entropy)
            case Step.SHARES:
                return member.shared(knows, message, identity.verify, entropy=self._entropy)
            case Step.MASKED:
                return member.masked(knows, message, self._numbers())
            case Step.AGREED:
                self._promise(wire.survivors_read(message, self.session))
                return member.agreed(knows, message, identity.sign)
            case Step.TOLD:
                return None, member.told(knows, message, identity.verify)


@dataclass(frozen=True)
class Answers:
    """What came back at a step, by member, and why others have left, where that is known."""

    messages: Messages
    left: Reasons = field(default_factory=dict)


Ask = Callable[[Step, Messages], Answers]
"""Hands each member its message, and returns what came back in time."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A sum: whose it is, why the others are not in it, and the bytes that crossed by member."""

    words: Ring
    members: tuple[int, ...]
    left: Mapping[int, str]
    bytes_up: Mapping[int, int]
    bytes_down: Mapping[int, int]


@dataclass
class _Counted:
    """What was asked, with the bytes that crossed."""

    ask: Ask
    bytes_up: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)

    def __call__(self, step: Step, messages: Messages) -> Answers:
        found = self.ask(step, messages)
        for kept, more in ((self.bytes_down, messages), (self.bytes_up, found.messages)):
            for one, message in more.items():
                kept[one] = kept.get(one, 0) + len(message)
        return found


def secure_sum(session: Session, present: tuple[int, ...], ask: Ask, verify: Verify, why: Reasons = NOBODY) -> Opened:
    """Do the server's part of a sum with those of the session who are ``present``; ``why`` says why others are not.

    Raises:
        TooFewClientsError: fewer members stayed than the threshold.
        UpdateError: a member told shares that are not of its secret.
    """
    counted = _Counted(ask)
    came = counted(Step.KEYS, dict.fromkeys(present, b""))
    roster, known = server.roster(session, came.messages, verify, {**why, **came.left})
    came = counted(Step.SHARES, dict.fromkeys(sorted(roster.known), known))
    delivered, posted = server.delivered(roster, came.messages, came.left)
    came = counted(Step.MASKED, posted)
    summed, survivors = server.summed(delivered, came.messages, came.left)
    del came  # the numbers of all members
    came = counted(Step.AGREED, dict.fromkeys(summed.members, survivors))
    agreed, agreements = server.agreed(summed, came.messages, came.left)
    came = counted(Step.TOLD, dict.fromkeys(agreed.members, agreements))
    words = server.unmasked(agreed, came.messages, came.left)
    return Opened(words, summed.members, summed.left, counted.bytes_up, counted.bytes_down)
