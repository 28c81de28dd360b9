"""Reads and checks an image's C2PA manifest with the C2PA library: who signed it, and what changed since.

    manifest = read(Path("cat.png").read_bytes(), "PNG")
    manifest.signer, manifest.wrong        # "Ann (Studio)", []

Needs the extra `c2pa`; `data.seal.holds_manifest` detects a manifest without it. Nothing is fetched: no remote
manifest, no revocation list, no trust list.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import UsageError, UserError, describe
from diptych.utils.documents import parse_json

EXTRA = "pip install 'diptych[c2pa]'"
LABEL = "diptych.provenance"  # the assertion with an image's provenance, as {"json": …}
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
PURPOSES = {  # extended key usages that C2PA accepts for a signer; the library's default is only the first
    "1.3.6.1.5.5.7.3.4": "emailProtection",
    "1.3.6.1.5.5.7.3.36": "documentSigning",
    "1.3.6.1.4.1.62558.2.1": "c2pa-kp-claimSigning",
}
_LIBRARY = "C2PA_LIBRARY_NAME"  # the environment variable that its loader reads first
_WORDS = {
    "assertion.dataHash.mismatch": "the image or its text changed since it was signed",
    "assertion.hashedURI.mismatch": "its assertion {part} changed",
    "claimSignature.mismatch": "its claim or its signature changed",
    "signingCredential.expired": (
        "the certificate has expired, and no trusted timestamp says that it was valid when it signed"
    ),
}
_UNTRUSTED = "signingCredential.untrusted"


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    `trusted` is None without a trust list. `wrong` is empty if hashes and signature are valid. `provenance` is the
    signed provenance of the image, or None if another program signed it.
    """

    signer: str
    time: str | None
    """Time of the signature (ISO 8601), if a trusted timestamp records it."""
    trusted: bool | None
    wrong: list[str]
    provenance: dict[str, Any] | None


def is_installed() -> bool:
    """Whether the extra is installed. Loads nothing."""
    return importlib.util.find_spec("c2pa") is not None


def library() -> Any:
    """The package `c2pa`. UsageError with the command that installs it, if it is missing or does not load."""
    spec = importlib.util.find_spec("c2pa")
    if spec is None or spec.origin is None:
        raise UsageError("dependency_missing", f"C2PA manifests need a library. Install it: {EXTRA}")
    # Its loader prefers a file of the right name in the current folder, which may come from somebody else. So the path
    # of the installed library is set explicitly.
    installed = [p for p in Path(spec.origin).parent.rglob("*c2pa_c.*") if p.suffix in (".so", ".dylib", ".dll")]
    named = _LIBRARY not in os.environ and len(installed) == 1
    if named:
        os.environ[_LIBRARY] = str(installed[0])
    try:
        return importlib.import_module("c2pa")
    except (ImportError, OSError, RuntimeError) as error:
        message = f"The C2PA library does not load ({describe(error)}). Reinstall it: {EXTRA}"
        raise UsageError("dependency_missing", message) from error
    finally:
        if named:
            os.environ.pop(_LIBRARY, None)


def context(trust: str | None = None, **sections: dict[str, Any]) -> Any:
    """The library's settings: nothing is fetched, all purposes of C2PA are accepted, `trust` (PEM) is trusted."""
    kinds = ("manifest", "tsa") if trust is not None else ()
    settings = {
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
        "trust": {
            "trust_config": "\n".join(PURPOSES),
            "anchors": [{"trust_kind": kind, "trust_anchors": trust} for kind in kinds],
        },
        **sections,
    }
    return library().Context.from_dict(settings)


def read_trust(files: Sequence[str | Path]) -> str | None:
    """PEM files of trusted certificates as one text; None without files. UsageError for a file without certificates."""
    if not files:
        return None
    library()
    from cryptography import x509

    texts = []
    for file in files:
        try:
            data = Path(file).read_bytes()
            x509.load_pem_x509_certificates(data)
        except OSError as error:
            raise UsageError(
                "path_unreadable", f"--trust {file}: cannot be read ({error.strerror or error})"
            ) from error
        except ValueError as error:
            message = f"--trust {file}: no certificates in PEM (-----BEGIN CERTIFICATE-----)"
            raise UsageError("key_invalid", message) from error
        texts.append(data.decode())
    return "\n".join(texts)


def read(data: bytes, kind: str, trust: str | None = None) -> Manifest:
    """Reads and checks the manifest in the bytes of a PNG, JPEG, or WebP.

    `trust` has trusted certificates (PEM) of signing and timestamp authorities. UserError if no manifest can be read;
    UsageError without the extra.
    """
    c2pa = library()
    try:
        with c2pa.Reader(MIME[kind], io.BytesIO(data), context=context(trust)) as reader:
            store = parse_json(reader.json())
    except c2pa.C2paError as error:
        raise UserError("signature_invalid", describe(error)) from error
    active = store.get("manifests", {}).get(store.get("active_manifest"))
    if active is None:
        raise UserError("signature_invalid", "the active manifest is missing")
    failed = store.get("validation_status", [])
    codes = {each["code"] for each in failed}
    signed = active.get("signature_info") or {}
    return Manifest(
        signer=name(signed.get("common_name"), signed.get("issuer")),
        time=signed.get("time") if "timeStamp.trusted" in _succeeded(store) else None,
        trusted=None if trust is None else _UNTRUSTED not in codes,
        wrong=list(dict.fromkeys(_explain(each) for each in failed if each["code"] != _UNTRUSTED)),
        provenance=_provenance(active),
    )


def _provenance(manifest: dict[str, Any]) -> dict[str, Any] | None:
    for assertion in manifest.get("assertions", []):
        if assertion["label"] == LABEL:
            try:
                return parse_json(assertion["data"]["json"])
            except (KeyError, TypeError, ValueError):
                return {}  # diptych does not write this, so it differs from the image's record
    return None


def name(common: str | None, organisation: str | None) -> str:
    """The subject of a certificate, in one line."""
    return f"{common} ({organisation})" if common and organisation else common or organisation or "an unnamed signer"


def _succeeded(store: dict[str, Any]) -> set[str]:
    results = store.get("validation_results", {}).get("activeManifest", {})
    return {each["code"] for each in results.get("success", [])}


def _explain(failure: dict[str, Any]) -> str:
    part = str(failure.get("url", "")).rpartition("/")[2]
    words = _WORDS.get(failure["code"])
    return words.format(part=part) if words else f"{failure.get('explanation') or part} ({failure['code']})"
