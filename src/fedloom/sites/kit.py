"""The kit of a server or a site: a private key, its certificate, and the root that both ends trust.

    server.key, server.crt, rootCA.pem     at the server
    client.key, client.crt, rootCA.pem     at a site

The files lie in the kit's folder or in ``startup`` inside it. A site's name is the common name of its certificate.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedloom.errors import MissingExtraError, RunError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

ROOT = "rootCA.pem"


@dataclass(frozen=True)
class Kit:
    """Key, certificate and root as PEM, and the name in the certificate."""

    key: bytes
    certificate: bytes
    root: bytes
    name: str


def read_kit(folder: Path | str, role: Literal["server", "client"]) -> Kit:
    """Read a kit, and check that its certificate is valid today and of its root.

    Raises:
        RunError: a file is absent or no such thing, or the certificate is expired, not valid yet or foreign.
        MissingExtraError: the library that reads certificates is absent.
    """
    folder = Path(folder)
    place = folder / "startup" if (folder / "startup" / ROOT).is_file() else folder
    key, certificate, root = (_read(place / name) for name in (f"{role}.key", f"{role}.crt", ROOT))
    own = _parsed(certificate, place / f"{role}.crt")
    check_certificate(own, _parsed(root, place / ROOT), place / f"{role}.crt")
    return Kit(key, certificate, root, common_name(own))


def check_certificate(own: Certificate, root: Certificate, path: Path | str) -> None:
    """Check a certificate's days and its issuer.

    Raises:
        RunError: saying which does not fit.
    """
    now, first, last = datetime.now(UTC), own.not_valid_before_utc, own.not_valid_after_utc
    if not first <= now <= last:
        raise RunError(
            f"{path}: expected a certificate that is valid now, got one valid from {first:%Y-%m-%d %H:%M} to "
            f"{last:%Y-%m-%d %H:%M} UTC, and the clock says {now:%Y-%m-%d %H:%M}; ask for a new one, or set the clock"
        )
    try:
        own.verify_directly_issued_by(root)
    except Exception as error:  # the library has an error of its own for every way in which it does not fit
        raise RunError(
            f"{path}: expected a certificate that {ROOT} beside it has signed, got one of another project; "
            "install the kit of this project"
        ) from error


def common_name(own: Certificate) -> str:
    """Return the name that a certificate is of; empty where it has none."""
    from cryptography.x509.oid import NameOID

    names = own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{path}: expected a file of the kit, got {(error.strerror or str(error)).lower()}; install the kit, or "
            "correct its folder"
        ) from error


def _parsed(data: bytes, path: Path) -> Certificate:
    try:
        from cryptography.x509 import load_pem_x509_certificate
    except ImportError as error:
        raise MissingExtraError("sites", "training across sites") from error
    try:
        return load_pem_x509_certificate(data)
    except ValueError as error:
        raise RunError(f"{path}: expected a certificate (PEM), got something else; install the kit again") from error
