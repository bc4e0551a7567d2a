"""Who a site is to the other sites: it signs with the key of its certificate, and shows the certificate.

A signature is told with the certificate that it is of, so that whoever trusts the project's root can check it:

    2 bytes   length of the certificate, big-endian
              the certificate (DER)
              the signature of the purpose and the text

It is a site's where the root has signed the certificate, it is valid today, and its common name is the one that the
study lists under the site's number. So a server, which passes signatures on, can put none of its own in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from hashlib import sha256
from types import ModuleType

from fedloom.errors import MissingExtraError, RunError
from fedloom.privacy.secure_sum.identities import Identity, Verify
from fedloom.sites.kit import Kit, check_certificate, common_name

_PURPOSE = b"fedloom: secure sum\n"
"""Begins everything that is signed here, so that no signature is one of a handshake or of a list of members."""
_LENGTH_BYTES = 2
_KEPT = 256


def identity_of(kit: Kit, names: Sequence[str]) -> Identity:
    """Return what a site signs with, and how it checks the signatures of the study's other sites, in their order.

    Raises:
        MissingExtraError: the library that signs is absent.
    """
    signatures = _signatures()
    shown: bytes = signatures.as_der(kit.certificate)
    begin: bytes = len(shown).to_bytes(_LENGTH_BYTES, "big") + shown

    def sign(text: bytes) -> bytes:
        return begin + bytes(signatures.sign(kit.key, _PURPOSE + text))

    return Identity(sign, verifier_of(kit.root, names))


def verifier_of(root: bytes, names: Sequence[str]) -> Verify:
    """Return what tells whether a signature is that of the site of a number, by a project's root (PEM).

    Raises:
        MissingExtraError: the library that checks signatures is absent.
    """
    signatures = _signatures()

    @lru_cache(_KEPT)
    def name_in(shown: bytes, _today: date) -> str | None:
        """Return whose certificate it is; None where it is none of the root, or not of today."""
        try:
            own = signatures.certificate_of(shown)
            check_certificate(own, signatures.root_of(root), "a site's certificate")
            return common_name(own)
        except (ValueError, RunError):
            return None

    def verify(member: int, text: bytes, signature: bytes) -> bool:
        length = int.from_bytes(signature[:_LENGTH_BYTES], "big")
        shown, signed = signature[_LENGTH_BYTES:][:length], signature[_LENGTH_BYTES + length :]
        if not 0 <= member < len(names) or name_in(shown, datetime.now(UTC).date()) != names[member]:
            return False
        return bool(signatures.verifies_with(signatures.certificate_of(shown), _PURPOSE + text, signed))

    return verify


def named(run: str, names: Sequence[str]) -> str:
    """Return what names a run's sums: sites that are told other lists of sites are in no sum together."""
    return f"{run} {sha256(repr(tuple(names)).encode()).hexdigest()}"


def _signatures() -> ModuleType:
    try:
        from fedloom.sites import signatures
    except ImportError as error:
        raise MissingExtraError("sites", "masked sums across sites") from error
    return signatures
