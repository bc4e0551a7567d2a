"""Keys of one session: agreements by X25519, seeds drawn from them by HKDF, envelopes by ChaCha20-Poly1305.

Every key is made for one session and used in it alone. What two members agree on is bound to the session's context and
to its purpose, so that a seed of one session or kind is none of another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedloom.errors import MissingExtraError, UpdateError
from fedloom.privacy.secure_sum.masks import SEED_BYTES

KEY_BYTES = 32
TAG_BYTES = 16
Entropy = Callable[[int], bytes]
"""Gives so many random bytes: ``os.urandom``, or in a test something that repeats."""


def public_of(private: bytes) -> bytes:
    """Return the public key of a private one (RFC 7748)."""
    raw: bytes = _x25519().X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return raw


def agreed(private: bytes, public: bytes, purpose: bytes, context: bytes) -> bytes:
    """Return the secret that two members share for one purpose of a session.

    Raises:
        UpdateError: the public key is one with which nothing secret can be agreed on.
    """
    x25519 = _x25519()
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    try:
        own = x25519.X25519PrivateKey.from_private_bytes(private)
        shared = own.exchange(x25519.X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise UpdateError("expected a public key of X25519, got another; leave that member out") from error
    info = b"fedloom secure sum 1 " + purpose
    derived: bytes = HKDF(hashes.SHA256(), SEED_BYTES, salt=context, info=info).derive(shared)
    return derived


def sealed(key: bytes, sender: int, receiver: int, context: bytes, text: bytes) -> bytes:
    """Return a text that only the receiver can read, bound to whom it is from and for; once per pair and direction."""
    nonce, bound = _addressed(sender, receiver, context)
    found: bytes = _aead()(key).encrypt(nonce, text, bound)
    return found


def opened(key: bytes, sender: int, receiver: int, context: bytes, envelope: bytes) -> bytes:
    """Return what :func:`sealed` was given.

    Raises:
        UpdateError: it was changed, or is from or for another.
    """
    from cryptography.exceptions import InvalidTag

    nonce, bound = _addressed(sender, receiver, context)
    try:
        found: bytes = _aead()(key).decrypt(nonce, envelope, bound)
    except InvalidTag as error:
        raise UpdateError(
            f"expected an envelope of member {sender} for member {receiver}, got one that was changed; start a new sum"
        ) from error
    return found


def _addressed(sender: int, receiver: int, context: bytes) -> tuple[bytes, bytes]:
    """Return a nonce that no other envelope under the pair's key has, and what is bound to it."""
    direction = sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")
    return direction + bytes(4), context + direction


def _x25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import x25519
    except ImportError as error:
        raise MissingExtraError("privacy", "privacy.sum") from error
    return x25519


def _aead() -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError as error:
        raise MissingExtraError("privacy", "privacy.sum") from error
    return ChaCha20Poly1305
