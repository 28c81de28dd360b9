"""Traces an image or a student back to the grids it came from, and compares every hash.

    result = trace("cat.png", ["runs/demo"])
    result["verified"]        # no link differs

Each link of the chain names the next by hash: the image its weights; the student its pairs, recipe, and teacher; each
dataset's manifest its parts and the dataset that it was made from. `chain` describes the status of a link.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diptych.data.images import KINDS, broken_seal, kind_of, read_provenance
from diptych.data.seal import holds_manifest
from diptych.data.store import MANIFEST
from diptych.errors import UsageError, UserError
from diptych.provenance import manifest
from diptych.provenance.chain import (
    ORDER,
    SUMMARY,
    Link,
    Places,
    holds_weights,
    model_here,
    origin,
    read_json,
    rows,
    student,
)
from diptych.utils import models
from diptych.utils.console import one_line
from diptych.utils.machine import VERSION
from diptych.utils.paths import refuse_special

MARKS = {"ok": "✓", "differs": "✗", "missing": "?", "unrecorded": "–"}


def trace(file: str | Path, places: Sequence[str | Path] = (), trust: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Traces an image, a weight file, a student's folder, a run, or one of its datasets.

    Args:
        places: folders with runs or weights, in addition to those above the file and `./runs`.
        trust: PEM files of certificates. An image must then have a C2PA manifest whose signer leads to one of them.

    Raises:
        UsageError: the file is neither an image that diptych made nor weights nor a dataset.
        UserError: the image cannot be decoded.
    """
    path = refuse_special(Path(file))
    if not path.exists():
        raise UsageError("path_not_found", f"{path} does not exist. Check the path.")
    if absent := [str(place) for place in places if not Path(place).is_dir()]:
        raise UsageError("path_not_found", f"--in {absent[0]} is not a folder. Check the path.")
    here = Places(path, [Path(place) for place in places])
    trusted = manifest.read_trust(trust)
    if path.suffix.lower() in KINDS and path.is_file():
        top = _picture(path, here, trusted)
    elif trusted is not None:
        raise UsageError("option_unsuited", f"--trust applies to images, and {path} is not one. Leave it out.")
    elif (path / "recipe.yaml").is_file():
        top = student(path / "student", here) if (path / "student").is_dir() else Link("run", str(path), "ok", "")
        if top.what == "run":
            top.links = rows(path, ORDER[0], None)
    elif (path / MANIFEST).is_file():
        top = rows(path.resolve().parent, path.resolve().name, None)[0]
    elif path.suffix in (".safetensors", ".sft") or (path.is_dir() and holds_weights(path)):
        top = student(path, here)
    else:
        raise UsageError(
            "path_wrong_kind",
            f"{path} is not an image (.png, .webp, .jpg), weights (.safetensors or their folder), or a dataset.",
        )
    links = list(top.all())
    return {"file": str(path), "verified": all(link.status != "differs" for link in links), "chain": asdict(top)}


def links(chain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each link of a chain of `trace`, from the top."""
    yield chain
    for below in chain["links"]:
        yield from links(below)


def format_trace(result: dict[str, Any]) -> list[str]:
    """The chain as a tree with a line for each link, and the counts of each status."""
    lines: list[str] = []
    statuses: list[str] = []

    def add(link: dict[str, Any], depth: int) -> None:
        statuses.append(link["status"])
        says = f"  {link['says']}" if link["says"] else ""
        lines.append(one_line(f"{'  ' * depth}{MARKS[link['status']]} {link['what']}  {link['where']}{says}"))
        for below in link["links"]:
            add(below, depth + 1)

    add(result["chain"], 0)
    counts = {status: statuses.count(status) for status in MARKS}
    words = {"ok": "verified", "differs": "differ", "missing": "not found", "unrecorded": "without a recorded hash"}
    return [*lines, ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])]


def _picture(path: Path, here: Places, trust: str | None) -> Link:
    record = read_provenance(path)
    if record is None:
        raise UsageError(
            "trace_invalid",
            f"{path}: an image without provenance. diptych did not make it, or another program saved it again.",
        )
    broken = broken_seal(path)
    says = f'"{record["prompt"]}"' if record.get("prompt") else f"step {record.get('step')} of a training"
    link = Link("picture", str(path), "unrecorded" if broken is None else "ok", says)
    if broken:
        link.status, link.says = "differs", f"its {' and '.join(broken)} changed since it was generated"
    link.links += _manifest(path, record, trust)
    if "fingerprints" not in record:  # a sheet of samples in the folder of its training
        trained = next((p for p in path.resolve().parents if (p / models.TRAINING / "samples").is_dir()), None)
        pairs = record.get("made_from", {}).get("pairs")
        link.links.append(
            student(trained, here, pairs)
            if trained
            else Link("student", "", "missing", "not found; pass the folder of its run with --in")
        )
        return link
    fingerprints = record["fingerprints"]
    name = str(record.get("model", ""))
    model = _student_of(name, fingerprints[0] if fingerprints else None, here, record)
    link.links.append(model)
    if model.status != "missing":
        version = record.get("versions", {}).get("diptych")
        link.links += [_base(each, name, model, version) for each in fingerprints[1:] if each]
    return link


def _manifest(path: Path, record: dict[str, Any], trust: str | None) -> list[Link]:
    """The link of an image's C2PA manifest, if it has one or must have one: its signer and whether it is unchanged."""
    data = path.read_bytes()
    if not holds_manifest(data):
        return [] if trust is None else [Link("manifest", "", "differs", "none, but --trust requires one")]
    if not manifest.is_installed():
        return [Link("manifest", "", "missing", f"C2PA, not verified; to verify it: {manifest.EXTRA}")]
    try:
        signed = manifest.read(data, kind_of(path), trust)
    except UsageError as error:  # it is installed but does not load
        return [Link("manifest", "", "missing", str(error))]
    except UserError as error:
        return [Link("manifest", "", "differs", f"it is damaged ({error})")]
    wrong = list(signed.wrong)
    if signed.provenance is not None and signed.provenance != record:
        wrong.append("the image's text differs from the signed text")
    if signed.trusted is False:
        wrong.append("its signer is not in a file of --trust")
    if wrong:
        return [Link("manifest", signed.signer, "differs", "; ".join(wrong))]
    says = (
        "its signer is trusted"
        if signed.trusted
        else "unchanged since it was signed; check the signer's identity with --trust FILE"
    )
    return [Link("manifest", signed.signer, "ok", f"{says}; {signed.time}" if signed.time else says)]


def _student_of(name: str, fingerprint: str | None, here: Places, record: dict[str, Any]) -> Link:
    """The student that an image names: the one with its fingerprint, else the one of that name, which then differs."""
    known = here.students()
    with suppress(UserError):  # the path of that name is not a model now
        if (named := model_here(name, "student")) is not None:
            known.insert(0, named)
    if fingerprint is None:
        match = next((p for p in known if _named(p, name)), None)
        if match is None:
            return Link(
                "student", name, "missing", "above 2 GiB, so its hash was not recorded; pass its folder with --in"
            )
        link = student(match, here)
        link.says += "; above 2 GiB, so the image does not name its hash"
        link.status = "unrecorded" if link.status == "ok" else link.status
        return link
    for path in known:
        if fingerprint in (models.fingerprint(path), models.fingerprint(path, training=True)):
            return student(path, here, matched=True)
    match = next((p for p in known if _recorded(p) == fingerprint), None)
    match = match or next((p for p in known if _named(p, name) and _recorded(p) is None), None)
    if match is None or (name in models.BUILT_IN and record.get("versions", {}).get("diptych") != VERSION):
        return Link("student", name, "missing", f"{fingerprint[:12]}… not found; pass the folder of its run with --in")
    link = student(match, here)
    link.status = "differs"
    link.says = f"its files are not those that generated the image ({fingerprint[:12]}…); {link.says}"
    return link


def _base(fingerprint: str, name: str, model: Link, version: str | None) -> Link:
    """The link of the base that completed a student: the one in its folder, or the one its training names."""
    folder = Path(model.where)
    named = name if name in models.BUILT_IN else str((origin(folder, folder) or {}).get("teacher", ""))
    try:
        path = model_here(named, "teacher")
    except UserError as error:
        return Link("base", named, "differs", str(error))
    if path is not None:
        if fingerprint in (models.fingerprint(path), models.fingerprint(path, training=True)):
            return Link("base", named, "ok", "")
        if version == VERSION:
            return Link("base", named, "differs", f"{path} is not the base {fingerprint[:12]}… of the student")
    return Link(
        "base", "", "missing", f"{fingerprint[:12]}… is not on this machine under the name that the student records"
    )


def _recorded(path: Path) -> str | None:
    """The fingerprint of a student at the end of its training."""
    return (read_json(path, SUMMARY) or {}).get("fingerprint")


def _named(path: Path, name: str) -> bool:
    wanted = Path(name).parts
    if name in models.BUILT_IN:
        return path == models.resolve(name, "student")
    return bool(wanted) and path.resolve().parts[-len(wanted) :] == wanted
