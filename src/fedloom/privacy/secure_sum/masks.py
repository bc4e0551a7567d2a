"""Masks: the key stream of ChaCha20 under a seed that is used once, as whole numbers modulo 2⁶⁴."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedloom.errors import MissingExtraError
from fedloom.privacy.secure_sum.fixed_point import WORD_BYTES, Ring

SEED_BYTES = 32
_NONCE = bytes(16)
"""Counter and nonce: a seed masks one vector, so they may be zero."""


def mask(seed: bytes, length: int) -> Ring:
    """Return the mask of a seed: RFC 8439's key stream from block 0, in words of eight bytes, the lowest first.

    Raises:
        MissingExtraError: ``cryptography`` is not installed.
    """
    ciphers = _ciphers()
    stream = ciphers.Cipher(ciphers.algorithms.ChaCha20(seed, _NONCE), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(WORD_BYTES * length)), "<u8").astype(np.uint64)


def check_masks() -> None:
    """Check that what masks are made with is installed.

    Raises:
        MissingExtraError: it is not.
    """
    _ciphers()


def _ciphers() -> Any:
    try:
        from cryptography.hazmat.primitives import ciphers
    except ImportError as error:
        raise MissingExtraError("privacy", "privacy.sum") from error
    return ciphers
