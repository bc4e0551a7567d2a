"""Certificates for the demo and for tests: a root of this machine, valid for a day, for loopback alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fedloom.errors import MissingExtraError
from fedloom.sites.kit import ROOT


class ThrowawayRoot:
    """A root that signs kits; its key is never written down."""

    def __init__(self) -> None:
        """Make one.

        Raises:
            MissingExtraError: the library that makes certificates is absent.
        """
        try:
            from cryptography.hazmat.primitives.asymmetric import ec
        except ImportError as error:
            raise MissingExtraError("sites", "the demo of sites") from error
        self._key: Any = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        self._root: Any = self._signed("demo root", self._key, now - timedelta(minutes=5), timedelta(days=1), root=True)

    def write(self, folder: Path, role: str, name: str, valid_from: datetime | None = None) -> Path:
        """Write a kit: ``role`` is server or client, ``name`` the common name; return its folder."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        first = valid_from or datetime.now(UTC) - timedelta(minutes=5)
        certificate = self._signed(name, key, first, timedelta(days=1), root=False)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        encoding = serialization.Encoding.PEM
        text = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{role}.key").touch(mode=0o600)
        (folder / f"{role}.key").write_bytes(text)
        (folder / f"{role}.crt").write_bytes(certificate.public_bytes(encoding))
        (folder / ROOT).write_bytes(self._root.public_bytes(encoding))
        return folder

    def _signed(self, name: str, key: Any, first: datetime, days: timedelta, *, root: bool) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.x509.oid import NameOID

        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName(name)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if root else self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(first)
            .not_valid_after(first + days)
            .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        )
        if not root:
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        return builder.sign(self._key, hashes.SHA256())
