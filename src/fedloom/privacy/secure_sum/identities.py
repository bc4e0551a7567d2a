"""Who a member is to the others: what signs its keys and its lists, and tells whose signature is whose.

Members of one process have keys that are made for the sum (Ed25519). Sites have those of their certificates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fedloom.errors import MissingExtraError

SIGNATURE_BYTES = 64
"""Of a signature between members of one process (RFC 8032)."""

Sign = Callable[[bytes], bytes]
Verify = Callable[[int, bytes, bytes], bool]
"""Tells whether a signature (the last) of a text is a member's (the first)."""


@dataclass(frozen=True)
class Identity:
    """What a member signs with, and how it checks the others' signatures."""

    sign: Sign = field(repr=False)
    verify: Verify


def local_identities(members: Iterable[int]) -> dict[int, Identity]:
    """Make a key for each member of one process, known to all the others.

    Raises:
        MissingExtraError: ``cryptography`` is not installed.
    """
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise MissingExtraError("privacy", "privacy.sum") from error
    private = {member: Ed25519PrivateKey.generate() for member in members}
    public = {member: key.public_key() for member, key in private.items()}

    def verify(member: int, text: bytes, signature: bytes) -> bool:
        try:
            public[member].verify(signature, text)
        except (InvalidSignature, KeyError):
            return False
        return True

    return {member: Identity(key.sign, verify) for member, key in private.items()}
