"""A certificate authority of the tests' own, whose certificates C2PA takes, or one that has just what is wrong."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SIGNER = "Ann (Test Studio)"
PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Signer:
    """Files: the signer's certificate and the authority's, its private key, the authority's certificate alone."""

    chain: Path
    key: Path
    trust: Path


def make(
    folder: Path,
    key: Any = None,
    *,
    common_name: str = "Ann",
    purposes: Sequence[x509.ObjectIdentifier] = (ExtendedKeyUsageOID.EMAIL_PROTECTION,),
    signs: bool = True,
    authority_key: bool = True,
    seconds: tuple[float, float] = (-86_400, 86_400),
    self_signed: bool = False,
) -> Signer:
    """A chain, its key and its authority in `folder`; `seconds` from now, the certificate's first and last moment."""
    folder.mkdir(parents=True, exist_ok=True)
    key = key or ec.generate_private_key(ec.SECP256R1())
    above = key if self_signed else ec.generate_private_key(ec.SECP256R1())
    root = _name("Test Root")
    authority = _certificate(root, above, root, above, (-86_400 * 400, 86_400 * 400), True, True, (), True)
    subject = root if self_signed else _name(common_name)
    leaf = _certificate(subject, key, root, above, seconds, signs, False, purposes, authority_key)
    found = Signer(folder / "chain.pem", folder / "key.pem", folder / "trust.pem")
    found.chain.write_bytes(leaf.public_bytes(PEM) + (b"" if self_signed else authority.public_bytes(PEM)))
    found.key.write_bytes(private(key))
    found.trust.write_bytes(authority.public_bytes(PEM))
    return found


def private(key: Any, password: str | None = None) -> bytes:
    """A private key in PEM."""
    lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock)


def _name(common: str) -> x509.Name:
    parts = ((NameOID.COUNTRY_NAME, "CH"), (NameOID.ORGANIZATION_NAME, "Test Studio"), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def _certificate(
    subject: x509.Name,
    key: Any,
    issuer: x509.Name,
    above: Any,
    seconds: tuple[float, float],
    signs: bool,
    authority: bool,
    purposes: Sequence[x509.ObjectIdentifier],
    authority_key: bool,
) -> x509.Certificate:
    first, last = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=each) for each in seconds)
    usage = dict.fromkeys(
        ("content_commitment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
    )
    usage |= {"digital_signature": not authority and signs, "key_encipherment": not authority and not signs}
    usage |= {"key_cert_sign": authority, "crl_sign": authority}
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if authority_key:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(above.public_key())
        builder = builder.add_extension(identifier, critical=False)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
    return builder.sign(above, None if isinstance(above, ed25519.Ed25519PrivateKey) else hashes.SHA256())
