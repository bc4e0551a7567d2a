"""Signatures with the key of a project's root; loading this module needs the library of the extra ``sites``."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate


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
    key = load_pem_x509_certificate(root_pem).public_key()
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
