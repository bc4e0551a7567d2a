"""A signature is a site's where the project's root signed its certificate, today, under the study's name for it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedloom.privacy.secure_sum.wire import MAX_SIGNATURE_BYTES
from fedloom.sites.kit import Kit, read_kit
from fedloom.sites.site_identity import identity_of, verifier_of
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")
NAMES = ("berlin", "oslo", "rome")


def kit_of(root: ThrowawayRoot, folder: Path, name: str, valid_from: datetime | None = None) -> Kit:
    place = root.write(folder / name, "client", name, valid_from)
    if valid_from is None:
        return read_kit(place, "client")
    parts = [(place / file).read_bytes() for file in ("client.key", "client.crt", "rootCA.pem")]
    return Kit(*parts, name)


def test_a_signature_is_taken_of_its_text_and_its_site_alone(tmp_path: Path) -> None:
    root = ThrowawayRoot()
    kits = {name: kit_of(root, tmp_path, name) for name in NAMES}
    own = identity_of(kits["oslo"], NAMES)
    signature = own.sign(b"text")
    verify = identity_of(kits["rome"], NAMES).verify
    assert verify(1, b"text", signature)
    assert len(signature) < MAX_SIGNATURE_BYTES
    for member, text in ((0, b"text"), (1, b"other"), (3, b"text"), (-2, b"text")):
        assert not verify(member, text, signature)
    for place in range(0, len(signature), 7):
        changed = bytes(byte ^ (n == place) for n, byte in enumerate(signature))
        assert not verify(1, b"text", changed), place
    for broken in (b"", b"\x00", b"\xff\xff", signature[:-1], signature + b"\x00"):
        assert not verify(1, b"text", broken)


def test_a_certificate_of_another_root_or_day_is_none(tmp_path: Path) -> None:
    root, verify_by = ThrowawayRoot(), {}
    oslo = kit_of(root, tmp_path, "oslo")
    verify_by["root"] = verifier_of(oslo.root, NAMES)
    foreign = kit_of(ThrowawayRoot(), tmp_path / "foreign", "oslo")
    assert not verify_by["root"](1, b"text", identity_of(foreign, NAMES).sign(b"text"))
    assert verifier_of(foreign.root, NAMES)(1, b"text", identity_of(foreign, NAMES).sign(b"text"))
    for start in (timedelta(days=-3), timedelta(days=3)):
        kit = kit_of(root, tmp_path / "old", "oslo", datetime.now(UTC) + start)
        assert not verify_by["root"](1, b"text", identity_of(kit, NAMES).sign(b"text"))


def test_a_key_of_rsa_signs_too() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import NameOID

    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "oslo")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    own = identity_of(Kit(text, pem, pem, "oslo"), NAMES)
    signature = own.sign(b"text")
    assert own.verify(1, b"text", signature)
    assert not own.verify(1, b"texts", signature)
