"""Who signs: a certificate chain and its private key, held against each other and against C2PA's rules.

What C2PA would refuse later, in the words of its library, is refused here in ours (C2PA specification 2, "X.509
certificates"). The private key stays in memory: it is not logged, shown or written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from diptych.errors import UsageError, nearest
from diptych.provenance.manifest import PURPOSES, library, name

KEY, PASSWORD = "DIPTYCH_SIGN_KEY", "DIPTYCH_SIGN_PASSWORD"  # a private key in PEM; what decrypts an encrypted one
RSA = ("ps256", "ps384", "ps512")
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
ALGORITHMS = (*CURVES.values(), *RSA, "ed25519")
ANY_PURPOSE = "2.5.29.37.0"
EXCLUSIVE = {"1.3.6.1.5.5.7.3.8": "timeStamping", "1.3.6.1.5.5.7.3.9": "OCSPSigning"}
_PURPOSE_HINT = f"get a certificate whose extended key usage holds one of {', '.join(PURPOSES.values())}"
_KINDS = "P-256, P-384, P-521, Ed25519, and RSA of 2048 bits or more"


@dataclass(frozen=True)
class Identity:
    """A certificate chain (PEM, the signer's first) and its private key (PEM), with what they sign by."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str
    signer: str
    until: str
    """The last day of the certificate, YYYY-MM-DD."""


def load_identity(certificate: str | Path, key: str | Path | None = None, algorithm: str | None = None) -> Identity:
    """A certificate chain and its private key, from files in PEM; the key from DIPTYCH_SIGN_KEY if `key` is None, the
    password of an encrypted one from DIPTYCH_SIGN_PASSWORD.

    UsageError, which says what to mend, for a chain out of order, self-signed, out of its time, not for signing, or
    not the key's. Needs the extra `c2pa`.
    """
    library()
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509.oid import NameOID

    data = _read(certificate, "--certificate")
    try:
        chain = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise UsageError(f"--certificate {certificate}: no certificates in PEM (-----BEGIN CERTIFICATE-----)") from None
    if problem := _problem(chain):
        raise UsageError(f"--certificate {certificate}: {problem}")
    private = _private_key(key)
    leaf = chain[0]
    if private.public_key() != leaf.public_key():
        raise UsageError(f"{_where(key)}: not the key of the first certificate in {certificate}")
    names = [
        next((str(each.value) for each in leaf.subject.get_attributes_for_oid(oid)), None)
        for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
    ]
    return Identity(
        chain=b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain),
        key=private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        algorithm=_algorithm(private, algorithm),
        signer=name(*names),
        until=f"{leaf.not_valid_after_utc:%Y-%m-%d}",
    )


def _problem(chain: Sequence[Any]) -> str | None:
    """Why C2PA would not take a chain, and what to do; None if it does."""
    from cryptography import x509

    leaf, now = chain[0], datetime.now(UTC)
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        return "its first certificate is an authority's; put the signer's own first"
    if leaf.issuer == leaf.subject:
        return "the certificate is self-signed, which C2PA does not take; get one from an authority"
    if now > leaf.not_valid_after_utc:
        return f"expired on {leaf.not_valid_after_utc:%Y-%m-%d}; renew it"
    if now < leaf.not_valid_before_utc:
        return f"not valid before {leaf.not_valid_before_utc:%Y-%m-%d}"
    usage = _extension(leaf, x509.KeyUsage)
    if usage is None or not usage.digital_signature:
        return "not made for signatures; its key usage must hold digitalSignature"
    purposes = {each.dotted_string for each in _extension(leaf, x509.ExtendedKeyUsage) or ()}
    if ANY_PURPOSE in purposes:
        return f"its extended key usage holds anyExtendedKeyUsage, which C2PA forbids; {_PURPOSE_HINT}"
    if not purposes & set(PURPOSES):
        return f"not made for signing content; {_PURPOSE_HINT}"
    if mixed := [name for oid, name in EXCLUSIVE.items() if oid in purposes]:
        return f"its extended key usage holds {mixed[0]}, which C2PA allows only alone; {_PURPOSE_HINT}"
    if _extension(leaf, x509.AuthorityKeyIdentifier) is None:
        return "it has no authority key identifier, which C2PA requires; ask the authority for one that has it"
    for number, (one, above) in enumerate(pairwise(chain), 1):
        try:
            one.verify_directly_issued_by(above)
        except Exception:  # ValueError, TypeError or InvalidSignature, by what does not fit
            return f"certificate {number + 1} did not issue certificate {number}; order them from the signer upwards"
    return None


def _extension(certificate: Any, kind: Any) -> Any:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _private_key(path: str | Path | None) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if path is None and not os.environ.get(KEY):
        raise UsageError(f"no private key: name its file with --key, or put it into the environment variable {KEY}")
    data = os.environ[KEY].encode() if path is None else _read(path, "--key")
    password = os.environ.get(PASSWORD, "").encode() or None
    # What a library says of a key is not repeated: none of it may reach a log.
    try:
        return load_pem_private_key(data, password)
    except UnsupportedAlgorithm:
        raise UsageError(f"{_where(path)}: a kind of key that C2PA does not take; it takes {_KINDS}") from None
    except TypeError:
        if password is None:
            raise UsageError(f"{_where(path)}: the key is encrypted; put its password into {PASSWORD}") from None
        return load_pem_private_key(data, None)  # a password, and a key that needs none
    except ValueError:
        wrong = f", or {PASSWORD} is wrong" if password else ""
        raise UsageError(f"{_where(path)}: no private key in PEM (-----BEGIN PRIVATE KEY-----){wrong}") from None


def _where(path: str | Path | None) -> str:
    return f"--key {path}" if path is not None else KEY


def _algorithm(key: Any, wanted: str | None) -> str:
    """The algorithm that a private key signs by. UsageError if C2PA has none for it, or it is not the wanted one."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if wanted is not None and wanted not in ALGORITHMS:
        raise UsageError(f"--algorithm {wanted}: one of {', '.join(ALGORITHMS)}{nearest(wanted, ALGORITHMS)}")
    able: tuple[str, ...] = ()
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        able = (CURVES[key.curve.name],)
    elif isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        able = RSA
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        able = ("ed25519",)
    if not able:
        raise UsageError(f"the key is of a kind that C2PA does not take; it takes {_KINDS}")
    if wanted is not None and wanted not in able:
        raise UsageError(f"--algorithm {wanted}: the key signs by {' or '.join(able)}")
    return wanted or able[0]


def _read(path: str | Path, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read ({error.strerror or error})") from None
