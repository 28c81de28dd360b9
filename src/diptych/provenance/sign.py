"""A C2PA manifest in a picture that diptych made: what made it, signed with a certificate of yours.

    sign(["cat.png"], "chain.pem", "key.pem")

The manifest says that a generative model created the picture, names the reference by its hash, and holds the picture's
own provenance, which stays in the file as it was: `diptych trace` verifies a signed picture as it does any other. Needs
the extra `c2pa`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.data.embedded import holds_manifest
from diptych.data.images import KINDS, broken_seal, kind_of, read_provenance
from diptych.data.store import write_atomic
from diptych.errors import UsageError, UserError
from diptych.provenance.certificate import Identity, load_identity
from diptych.provenance.manifest import LABEL, MIME, context, library

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
        raise UserError(f"it could not be signed ({' '.join(str(error).split())[:200]})") from error
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
