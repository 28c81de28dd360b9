"""Signs images that diptych made: a C2PA manifest records what made them, signed with your certificate.

    sign(["cat.png"], "chain.pem", "key.pem")

The manifest states that a generative model created the image, names the reference by its hash, and contains the image's
provenance. The provenance in the file stays unchanged, so `diptych trace` verifies signed images like others. Needs the
extra `c2pa`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from diptych.data.images import KINDS, broken_seal, kind_of, read_provenance
from diptych.data.seal import holds_manifest
from diptych.errors import UsageError, UserError, describe, nearest
from diptych.provenance.manifest import LABEL, MIME, PURPOSES, context, library, name
from diptych.utils.io import write_atomic

_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
Report = Callable[[int, int], None]


def sign(
    files: Sequence[str | Path],
    certificate: str | Path,
    key: str | Path | None = None,
    *,
    algorithm: str | None = None,
    timestamp: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Signs images in place or into `out`. All images are checked before the first is written.

    Args:
        certificate: PEM file with the signer's certificate, then those of its authorities.
        key: PEM file with the private key; None reads the key from the environment variable DIPTYCH_SIGN_KEY.
        algorithm: one of ALGORITHMS; None selects it by the key.
        timestamp: address of an RFC 3161 server, which gets one request for each image.
        out: file for one image, or a folder; None signs in place.
        overwrite: replace existing manifests and files.
        report: called with the number of finished images and the total.

    Returns:
        `signed` and `kept` (already signed) files; `signer`; `until`, the last day of the certificate.

    Raises:
        UsageError: the extra is missing, C2PA does not accept the certificate or key, or diptych did not make a file.
        UserError: an image changed since it was generated, the timestamp server failed, or a file cannot be written.
    """
    library()
    if timestamp is not None and not timestamp.startswith(("http://", "https://")):
        raise UsageError("option_invalid", f"--timestamp {timestamp} is not an address (http:// or https://).")
    identity = load_identity(certificate, key, algorithm)
    pending, kept = _plan(files, out, overwrite)
    signed: list[Path] = []
    for done, (path, target) in enumerate(pending):
        if report:
            report(done, len(pending))
        try:
            data = sign_bytes(path.read_bytes(), kind_of(path), identity, title=target.name, timestamp=timestamp)
        except UserError as error:
            raise UserError(error.code, f"{path}: {error}") from error
        _write(target, data)
        signed.append(target)
    if report and pending:
        report(len(pending), len(pending))
    return {"signed": signed, "kept": kept, "signer": identity.signer, "until": identity.until}


def _write(target: Path, data: bytes) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("path_unwritable", f"{target.parent}: cannot be created ({error.strerror or error})") from error
    write_atomic(target, data)


def sign_bytes(data: bytes, kind: str, identity: Credentials, *, title: str, timestamp: str | None = None) -> bytes:
    """The bytes of a PNG, JPEG, or WebP that diptych made, with a new manifest that replaces any other.

    UsageError if they have no provenance; UserError if the manifest cannot be made.
    """
    c2pa = library()
    record = read_provenance(data)
    if record is None:
        raise UsageError("trace_invalid", "the image has no provenance")
    settings = context(builder={"thumbnail": {"enabled": False}, "created_assertion_labels": ["c2pa.ingredient"]})
    signed = io.BytesIO()
    try:
        info = c2pa.C2paSignerInfo(identity.algorithm, identity.chain, identity.key, timestamp)
        with (
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder.from_json(json.dumps(definition(record, title)), settings) as builder,
        ):
            builder.sign(signer, MIME[kind], io.BytesIO(data), signed)
    except c2pa.C2paError as error:
        raise UserError("signature_invalid", f"the image could not be signed ({describe(error)})") from error
    made = signed.getvalue()
    if read_provenance(made) != record or broken_seal(made) != broken_seal(data):
        raise UserError("signature_invalid", "the C2PA library changed more than the manifest; nothing was written")
    return made


def definition(record: dict[str, Any], title: str) -> dict[str, Any]:
    """The manifest of an image with this provenance, in the form of the C2PA library."""
    from diptych.utils.machine import VERSION

    action: dict[str, Any] = {
        "action": "c2pa.created",
        "digitalSourceType": source_type(record),
        "softwareAgent": _agent(record.get("versions", {}).get("diptych")),
    }
    ingredients = []
    if digest := record.get("reference_sha256"):
        action["parameters"] = {"ingredientIds": ["reference"]}
        ingredients.append(
            {
                "label": "reference",
                "title": record.get("reference_file", "reference"),
                "relationship": "inputTo",
                "instance_id": f"sha256:{digest}",
                "description": "the reference picture; the instance is the sha256 of its file",
            }
        )
    # As text, because C2PA's readers show a list of numbers as base64, and its CBOR has no integers above 2^63.
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return {
        "claim_generator_info": [_agent(VERSION)],
        "title": record.get("title") or title,
        "ingredients": ingredients,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}, "created": True},
            {"label": LABEL, "data": {"json": text}, "created": True},
        ],
    }


def source_type(record: Mapping[Any, Any]) -> str:
    """IPTC's digital source type of an image, as an address. A relit image with pixels or fine detail of its reference
    is a composite."""
    composite = "mask" in record or bool(record.get("detail"))
    return _SOURCE + ("compositeWithTrainedAlgorithmicMedia" if composite else "trainedAlgorithmicMedia")


def _agent(version: str | None) -> dict[str, str]:
    return {"name": "diptych", **({"version": version} if version else {})}


def _plan(files: Sequence[str | Path], out: str | Path | None, overwrite: bool) -> tuple[list[Any], list[Path]]:
    """The images to sign, each as (image, output file), and those that are already signed."""
    paths = list(dict.fromkeys(Path(file) for file in files))
    folder = _folder(out, paths)
    pending: list[tuple[Path, Path]] = []
    kept: list[Path] = []
    taken: dict[Path, Path] = {}
    for path in paths:
        target = path if out is None else folder / path.name if folder else Path(out)
        if taken.setdefault(target, path) != path:
            message = f"{taken[target]} and {path} would both be written to {target}. Sign them into two folders."
            raise UsageError("output_collision", message)
        if (kind := _check(path)) != kind_of(target):
            message = f"{target}: {path} is a {kind}, and signing does not convert. Use the same extension."
            raise UsageError("option_invalid", message)
        exists = target.exists() and not overwrite
        if exists and holds_manifest(target.read_bytes()):
            kept.append(target)
        elif exists and target != path:
            raise UsageError("output_exists", f"{target} already exists. Choose another --out, or add --overwrite.")
        elif target != path and not overwrite and holds_manifest(path.read_bytes()):
            raise UsageError("output_exists", f"{path} is already signed. Add --overwrite to replace its manifest.")
        else:
            pending.append((path, target))
    return pending, kept


def _folder(out: str | Path | None, paths: Sequence[Path]) -> Path | None:
    if out is None:
        return None
    if str(out).endswith("/") or Path(out).is_dir():
        return Path(out)
    if len(paths) > 1:
        raise UsageError("option_invalid", f"--out {out}: {len(paths)} images need a folder. End its name with /.")
    return None


def _check(path: Path) -> str:
    """The format (PNG, JPEG, or WEBP) of an image that diptych made and that is unchanged."""
    if path.is_dir():
        raise UsageError("path_wrong_kind", f"{path} is a folder. Pass the images in it ({path}/*.png).")
    if not path.exists():
        raise UsageError("image_not_found", f"{path} does not exist. Check the path.")
    if path.suffix.lower() not in KINDS:
        raise UsageError("file_format_unknown", f"{path}: only PNG, WebP, and JPEG images can be signed.")
    try:
        record, broken = read_provenance(path), broken_seal(path)
    except UserError as error:
        raise UsageError(error.code, str(error)) from error
    if record is None:
        message = f"{path} has no provenance: diptych did not make it, or another program saved it again."
        raise UsageError("trace_invalid", message)
    if broken:
        message = f"{path}: its {' and '.join(broken)} changed since it was generated. Sign the original file."
        raise UserError("trace_invalid", message)
    return kind_of(path)


# The certificate chain and its private key are checked against each other and against C2PA's rules (C2PA specification
# 2, "X.509 certificates"), so that errors are clear. The private key stays in memory: it is never logged or written.

KEY, PASSWORD = "DIPTYCH_SIGN_KEY", "DIPTYCH_SIGN_PASSWORD"  # a private key in PEM; the password of an encrypted one
RSA = ("ps256", "ps384", "ps512")
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
ALGORITHMS = (*CURVES.values(), *RSA, "ed25519")
ANY_PURPOSE = "2.5.29.37.0"
EXCLUSIVE = {"1.3.6.1.5.5.7.3.8": "timeStamping", "1.3.6.1.5.5.7.3.9": "OCSPSigning"}
_PURPOSE_HINT = f"get a certificate whose extended key usage has one of {', '.join(PURPOSES.values())}"
_KINDS = "P-256, P-384, P-521, Ed25519, and RSA of 2048 bits or more"


@dataclass(frozen=True)
class Credentials:
    """A certificate chain (PEM, the signer's first), its private key (PEM), and their algorithm."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: str
    signer: str
    until: str
    """The last day of the certificate, YYYY-MM-DD."""


def load_identity(certificate: str | Path, key: str | Path | None = None, algorithm: str | None = None) -> Credentials:
    """Loads a certificate chain and its private key from PEM files. Without `key`, the key is read from
    DIPTYCH_SIGN_KEY; the password of an encrypted key is read from DIPTYCH_SIGN_PASSWORD.

    UsageError for a chain that is out of order, self-signed, expired, not for signing, or without the key. Needs the
    extra `c2pa`.
    """
    library()
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509.oid import NameOID

    data = _read(certificate, "--certificate")
    try:
        chain = x509.load_pem_x509_certificates(data)
    except ValueError:
        message = f"--certificate {certificate}: no certificates in PEM (-----BEGIN CERTIFICATE-----)"
        raise UsageError("key_invalid", message) from None
    if problem := _problem(chain):
        raise UsageError("key_invalid", f"--certificate {certificate}: {problem}")
    private = _private_key(key)
    leaf = chain[0]
    if private.public_key() != leaf.public_key():
        raise UsageError("key_invalid", f"{_where(key)}: not the key of the first certificate in {certificate}")
    names = [
        next((str(each.value) for each in leaf.subject.get_attributes_for_oid(oid)), None)
        for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
    ]
    return Credentials(
        chain=b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain),
        key=private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        algorithm=_algorithm(private, algorithm),
        signer=name(*names),
        until=f"{leaf.not_valid_after_utc:%Y-%m-%d}",
    )


def _problem(chain: Sequence[Any]) -> str | None:
    """Why C2PA does not accept a chain, and the remedy; None if it does."""
    from cryptography import x509

    leaf, now = chain[0], datetime.now(UTC)
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        return "its first certificate is an authority's; put the signer's first"
    if leaf.issuer == leaf.subject:
        return "the certificate is self-signed, which C2PA does not accept; get one from an authority"
    if now > leaf.not_valid_after_utc:
        return f"expired on {leaf.not_valid_after_utc:%Y-%m-%d}; renew it"
    if now < leaf.not_valid_before_utc:
        return f"not valid before {leaf.not_valid_before_utc:%Y-%m-%d}"
    usage = _extension(leaf, x509.KeyUsage)
    if usage is None or not usage.digital_signature:
        return "not made for signatures; its key usage must have digitalSignature"
    purposes = {each.dotted_string for each in _extension(leaf, x509.ExtendedKeyUsage) or ()}
    if ANY_PURPOSE in purposes:
        return f"its extended key usage has anyExtendedKeyUsage, which C2PA forbids; {_PURPOSE_HINT}"
    if not purposes & set(PURPOSES):
        return f"not made for signing content; {_PURPOSE_HINT}"
    if mixed := [name for oid, name in EXCLUSIVE.items() if oid in purposes]:
        return f"its extended key usage has {mixed[0]}, which C2PA allows only alone; {_PURPOSE_HINT}"
    if _extension(leaf, x509.AuthorityKeyIdentifier) is None:
        return "it has no authority key identifier, which C2PA requires; request one from the authority"
    for number, (lower, above) in enumerate(pairwise(chain), 1):
        try:
            lower.verify_directly_issued_by(above)
        except Exception:  # ValueError, TypeError, or InvalidSignature
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
        message = f"No private key. Pass its file with --key, or set the environment variable {KEY}."
        raise UsageError("option_missing", message)
    data = os.environ[KEY].encode() if path is None else _read(path, "--key")
    password = os.environ.get(PASSWORD, "").encode() or None
    # Messages of the library are not repeated, because parts of the key could reach a log.
    try:
        return load_pem_private_key(data, password)
    except UnsupportedAlgorithm:
        raise UsageError(
            "key_invalid", f"{_where(path)}: C2PA does not accept this kind of key, only {_KINDS}."
        ) from None
    except TypeError:
        if password is None:
            message = f"{_where(path)}: the key is encrypted. Set {PASSWORD} to its password."
            raise UsageError("key_invalid", message) from None
        return load_pem_private_key(data, None)  # the key needs no password
    except ValueError:
        wrong = f", or {PASSWORD} is wrong" if password else ""
        message = f"{_where(path)}: no private key in PEM (-----BEGIN PRIVATE KEY-----){wrong}"
        raise UsageError("key_invalid", message) from None


def _where(path: str | Path | None) -> str:
    return f"--key {path}" if path is not None else KEY


def _algorithm(key: Any, wanted: str | None) -> str:
    """The signature algorithm of a private key. UsageError if C2PA has none for it, or if it is not the wanted one."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if wanted is not None and wanted not in ALGORITHMS:
        hint = nearest(wanted, ALGORITHMS)
        raise UsageError("option_invalid", f"--algorithm {wanted} is not one of {', '.join(ALGORITHMS)}{hint}")
    able: tuple[str, ...] = ()
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        able = (CURVES[key.curve.name],)
    elif isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        able = RSA
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        able = ("ed25519",)
    if not able:
        raise UsageError("key_invalid", f"C2PA does not accept this kind of key, only {_KINDS}.")
    if wanted is not None and wanted not in able:
        raise UsageError(
            "option_conflict", f"--algorithm {wanted} does not fit the key, which signs with {' or '.join(able)}."
        )
    return wanted or able[0]


def _read(path: str | Path, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError("path_unreadable", f"{option} {path}: cannot be read ({error.strerror or error})") from None
