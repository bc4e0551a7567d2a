"""Signatures with the keys of certificates; loading this module needs the library of the extra ``sites``."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import Certificate, load_der_x509_certificate, load_pem_x509_certificate


def sign(key_pem: bytes, statement: bytes) -> bytes:
    """Return the signature of a statement.

    Raises:
        ValueError, TypeError: what is given is no key, an encrypted one, or of a kind that signs no certificates.
    """
    key = load_pem_private_key(key_pem, None)
    match key:
        case rsa.RSAPrivateKey():
            return bytes(key.sign(statement, padding.PKCS1v15(), SHA256()))
        case ec.EllipticCurvePrivateKey():
            return bytes(key.sign(statement, ec.ECDSA(SHA256())))
    raise ValueError(f"expected an RSA or elliptic-curve key, got {type(key).__name__}; make the root anew")


def verifies(root_pem: bytes, statement: bytes, signature: bytes) -> bool:
    """Tell whether a signature of a statement is by the key of a root's certificate."""
    return verifies_with(root_of(root_pem), statement, signature)


def verifies_with(certificate: Certificate, statement: bytes, signature: bytes) -> bool:
    """Tell whether a signature of a statement is by the key of a certificate."""
    key = certificate.public_key()
    try:
        match key:
            case rsa.RSAPublicKey():
                key.verify(signature, statement, padding.PKCS1v15(), SHA256())
            case ec.EllipticCurvePublicKey():
                key.verify(signature, statement, ec.ECDSA(SHA256()))
            case _:
                return False
    except InvalidSignature:
        return False
    return True


def root_of(pem: bytes) -> Certificate:
    """Return a certificate that was read from PEM."""
    return load_pem_x509_certificate(pem)


def certificate_of(der: bytes) -> Certificate:
    """Return a certificate that somebody shows.

    Raises:
        ValueError: it is none.
    """
    return load_der_x509_certificate(der)


def as_der(pem: bytes) -> bytes:
    """Return a certificate in the shorter form in which it is shown."""
    return bytes(load_pem_x509_certificate(pem).public_bytes(Encoding.DER))
