"""A picture's C2PA manifest, read and checked by C2PA's own library: who signed it, and what is not as it was signed.

    found = read(Path("cat.png").read_bytes(), "PNG")
    found.signer, found.wrong        # "Ann (Studio)", []

Needs the extra `c2pa`; whether there is a manifest at all, `data.embedded.holds_manifest` tells without. Nothing is
fetched: no manifest that lies elsewhere, no revocation list, no trust list.
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
LABEL = "diptych.provenance"  # the assertion that holds a picture's own text, as {"json": …}
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
PURPOSES = {  # extended key usages that C2PA takes for a signer; the library's own default is the first one alone
    "1.3.6.1.5.5.7.3.4": "emailProtection",
    "1.3.6.1.5.5.7.3.36": "documentSigning",
    "1.3.6.1.4.1.62558.2.1": "c2pa-kp-claimSigning",
}
_LIBRARY = "C2PA_LIBRARY_NAME"  # the environment variable that its loader looks at first
_WORDS = {
    "assertion.dataHash.mismatch": "the picture or its text changed since it was signed",
    "assertion.hashedURI.mismatch": "its assertion {part} changed",
    "claimSignature.mismatch": "its claim or its signature changed",
    "signingCredential.expired": (
        "the certificate has expired, and no trusted timestamp says that it was valid when it signed"
    ),
}
_UNTRUSTED = "signingCredential.untrusted"


@dataclass(frozen=True)
class Manifest:
    """`trusted` is None where no trust list was given; `wrong` is empty if hashes and signature hold; `provenance` is
    the picture's as it was signed, None if another program signed it."""

    signer: str
    time: str | None
    """When it was signed (ISO 8601), if a timestamp that the trust list covers says so."""
    trusted: bool | None
    wrong: list[str]
    provenance: dict[str, Any] | None


def is_installed() -> bool:
    """Whether the extra is there. Loads nothing."""
    return importlib.util.find_spec("c2pa") is not None


def library() -> Any:
    """The package `c2pa`. UsageError, which says what to install, where it is missing or does not load."""
    spec = importlib.util.find_spec("c2pa")
    if spec is None or spec.origin is None:
        raise UsageError(f"C2PA manifests need a library: {EXTRA}")
    # Its loader takes a file of the right name in the current folder before its own, and pictures lie in folders that
    # others have filled: the library to load is named outright.
    own = [p for p in Path(spec.origin).parent.rglob("*c2pa_c.*") if p.suffix in (".so", ".dylib", ".dll")]
    named = _LIBRARY not in os.environ and len(own) == 1
    if named:
        os.environ[_LIBRARY] = str(own[0])
    try:
        return importlib.import_module("c2pa")
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"the C2PA library does not load ({describe(error)}); reinstall it: {EXTRA}") from error
    finally:
        if named:
            os.environ.pop(_LIBRARY, None)


def context(trust: str | None = None, **sections: dict[str, Any]) -> Any:
    """The library's settings: nothing fetched, all of C2PA's purposes taken, and the trust list, if any (PEM)."""
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
    """Files of trusted certificates (PEM) as one text; None for no files. UsageError for one that holds none."""
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
            raise UsageError(f"--trust {file}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise UsageError(f"--trust {file}: no certificates in PEM (-----BEGIN CERTIFICATE-----)") from error
        texts.append(data.decode())
    return "\n".join(texts)


def read(data: bytes, kind: str, trust: str | None = None) -> Manifest:
    """The manifest in the bytes of a PNG, JPEG or WEBP, checked. `trust`: trusted certificates (PEM), of signers'
    authorities and of timestamps'. UserError if there is none that can be read; UsageError without the extra.
    """
    c2pa = library()
    try:
        with c2pa.Reader(MIME[kind], io.BytesIO(data), context=context(trust)) as reader:
            store = parse_json(reader.json())
    except c2pa.C2paError as error:
        raise UserError(describe(error)) from error
    active = store.get("manifests", {}).get(store.get("active_manifest"))
    if active is None:
        raise UserError("the manifest that counts is not in it")
    failed = store.get("validation_status", [])
    codes = {each["code"] for each in failed}
    signed = active.get("signature_info") or {}
    return Manifest(
        signer=name(signed.get("common_name"), signed.get("issuer")),
        time=signed.get("time") if "timeStamp.trusted" in _succeeded(store) else None,
        trusted=None if trust is None else _UNTRUSTED not in codes,
        wrong=list(dict.fromkeys(_said(each) for each in failed if each["code"] != _UNTRUSTED)),
        provenance=_provenance(active),
    )


def _provenance(manifest: dict[str, Any]) -> dict[str, Any] | None:
    for assertion in manifest.get("assertions", []):
        if assertion["label"] == LABEL:
            try:
                return parse_json(assertion["data"]["json"])
            except (KeyError, TypeError, ValueError):
                return {}  # not what diptych writes, so not what the picture says
    return None


def name(common: str | None, organisation: str | None) -> str:
    """Whom a certificate names, in one line."""
    return f"{common} ({organisation})" if common and organisation else common or organisation or "nobody named"


def _succeeded(store: dict[str, Any]) -> set[str]:
    results = store.get("validation_results", {}).get("activeManifest", {})
    return {each["code"] for each in results.get("success", [])}


def _said(failure: dict[str, Any]) -> str:
    part = str(failure.get("url", "")).rpartition("/")[2]
    words = _WORDS.get(failure["code"])
    return words.format(part=part) if words else f"{failure.get('explanation') or part} ({failure['code']})"
