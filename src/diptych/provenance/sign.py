"""A C2PA manifest in a picture that diptych made: what made it, signed with a certificate of yours.

    sign(["cat.png"], "chain.pem", "key.pem")

The manifest says that a generative model created the picture, names the reference by its hash, and holds the picture's
own provenance, which stays in the file as it was: `diptych trace` verifies a signed picture as it does any other. Needs
the extra `c2pa`.
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
    """Signs pictures where they lie, or into `out`. All are looked at before the first is written.

    Args:
        certificate: a PEM file, the signer's certificate first, then those of the authorities above it.
        key: its private key, a PEM file; None: the key itself in the environment variable DIPTYCH_SIGN_KEY.
        algorithm: one of ALGORITHMS; None: what the key is for.
        timestamp: the address of an RFC 3161 authority, asked once a picture.
        out: a file for one picture, or a folder; None: each picture in its place.
        overwrite: replaces a manifest that a picture has, and files that are there.
        report: called with the pictures done and all there are.

    Returns:
        `signed` and `kept` (signed before), files; `signer`; `until`, the last day of the certificate.

    Raises:
        UsageError: no extra, a certificate or key that C2PA does not take, a file that is no picture of diptych's.
        UserError: a picture that changed since it was drawn; a timestamp that does not come; a disk that is full.
    """
    library()
    if timestamp is not None and not timestamp.startswith(("http://", "https://")):
        raise UsageError(f"--timestamp {timestamp}: not an address (http:// or https://)")
    identity = load_identity(certificate, key, algorithm)
    pending, kept = _plan(files, out, overwrite)
    signed: list[Path] = []
    for done, (path, target) in enumerate(pending):
        if report:
            report(done, len(pending))
        try:
            data = sign_bytes(path.read_bytes(), kind_of(path), identity, title=target.name, timestamp=timestamp)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        _write(target, data)
        signed.append(target)
    if report and pending:
        report(len(pending), len(pending))
    return {"signed": signed, "kept": kept, "signer": identity.signer, "until": identity.until}


def _write(target: Path, data: bytes) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be made ({error.strerror or error})") from error
    write_atomic(target, data)


def sign_bytes(data: bytes, kind: str, identity: Identity, *, title: str, timestamp: str | None = None) -> bytes:
    """The bytes of a PNG, JPEG or WEBP that diptych made, with a manifest in place of any there was.

    UsageError if they do not say what made them; UserError if the manifest cannot be made.
    """
    c2pa = library()
    told = read_provenance(data)
    if told is None:
        raise UsageError("it does not say what made it")
    own = context(builder={"thumbnail": {"enabled": False}, "created_assertion_labels": ["c2pa.ingredient"]})
    signed = io.BytesIO()
    try:
        info = c2pa.C2paSignerInfo(identity.algorithm, identity.chain, identity.key, timestamp)
        with (
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder.from_json(json.dumps(definition(told, title)), own) as builder,
        ):
            builder.sign(signer, MIME[kind], io.BytesIO(data), signed)
    except c2pa.C2paError as error:
        raise UserError(f"it could not be signed ({describe(error)})") from error
    made = signed.getvalue()
    if read_provenance(made) != told or broken_seal(made) != broken_seal(data):
        raise UserError("the C2PA library changed more of the file than its manifest; nothing was written")
    return made


def definition(told: dict[str, Any], title: str) -> dict[str, Any]:
    """The manifest of a picture with the provenance `told`, as C2PA's library takes it."""
    from diptych.utils.machine import VERSION

    action: dict[str, Any] = {
        "action": "c2pa.created",
        "digitalSourceType": source_type(told),
        "softwareAgent": _agent(told.get("versions", {}).get("diptych")),
    }
    ingredients = []
    if digest := told.get("reference_sha256"):
        action["parameters"] = {"ingredientIds": ["reference"]}
        ingredients.append(
            {
                "label": "reference",
                "title": told.get("reference_file", "reference"),
                "relationship": "inputTo",
                "instance_id": f"sha256:{digest}",
                "description": "the reference picture; the instance is the sha256 of its file",
            }
        )
    # As text: C2PA's readers take a list of numbers for bytes and show its base64, and its CBOR has no seed above 2^63.
    text = json.dumps(told, sort_keys=True, ensure_ascii=False)
    return {
        "claim_generator_info": [_agent(VERSION)],
        "title": told.get("title") or title,
        "ingredients": ingredients,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}, "created": True},
            {"label": LABEL, "data": {"json": text}, "created": True},
        ],
    }


def source_type(told: Mapping[Any, Any]) -> str:
    """IPTC's word for how a picture came about, as an address. A relit one that holds pixels or fine detail of its
    reference is a composite."""
    composite = "mask" in told or bool(told.get("detail"))
    return _SOURCE + ("compositeWithTrainedAlgorithmicMedia" if composite else "trainedAlgorithmicMedia")


def _agent(version: str | None) -> dict[str, str]:
    return {"name": "diptych", **({"version": version} if version else {})}


def _plan(files: Sequence[str | Path], out: str | Path | None, overwrite: bool) -> tuple[list[Any], list[Path]]:
    """(picture, file to write) of each that is to be signed, and those that are signed already."""
    paths = list(dict.fromkeys(Path(file) for file in files))
    folder = _folder(out, paths)
    pending: list[tuple[Path, Path]] = []
    kept: list[Path] = []
    taken: dict[Path, Path] = {}
    for path in paths:
        target = path if out is None else folder / path.name if folder else Path(out)
        if taken.setdefault(target, path) != path:
            raise UsageError(f"{taken[target]} and {path} would both be {target}; sign them into two folders")
        if (kind := _check(path)) != kind_of(target):
            raise UsageError(f"{target}: {path} is a {kind}, and signing converts nothing; end both names alike")
        there = target.exists() and not overwrite
        if there and holds_manifest(target.read_bytes()):
            kept.append(target)
        elif there and target != path:
            raise UsageError(f"{target} is there already; name another --out, or add --overwrite")
        elif target != path and not overwrite and holds_manifest(path.read_bytes()):
            raise UsageError(f"{path} is signed already; --overwrite replaces its manifest by yours")
        else:
            pending.append((path, target))
    return pending, kept


def _folder(out: str | Path | None, paths: Sequence[Path]) -> Path | None:
    if out is None:
        return None
    if str(out).endswith("/") or Path(out).is_dir():
        return Path(out)
    if len(paths) > 1:
        raise UsageError(f"--out {out}: {len(paths)} pictures need a folder; end its name in /")
    return None


def _check(path: Path) -> str:
    """PNG, JPEG or WEBP, if it is a picture of diptych's and still what was drawn."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the pictures in it ({path}/*.png)")
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path}: only PNG, WebP and JPEG pictures are signed")
    try:
        told, broken = read_provenance(path), broken_seal(path)
    except UserError as error:
        raise UsageError(str(error)) from error
    if told is None:
        raise UsageError(f"{path}: not a picture that diptych made, or it was saved anew; only what made one is signed")
    if broken:
        raise UserError(f"{path}: its {' and '.join(broken)} changed since it was drawn; it is not signed as drawn")
    return kind_of(path)


# Who signs: a certificate chain and its private key, held against each other and against C2PA's rules. What C2PA
# would refuse later, in the words of its library, is refused here in ours (C2PA specification 2, "X.509
# certificates"). The private key stays in memory: it is not logged, shown or written.

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
