"""From a picture or a student back to the grids it came from, every hash on the way compared.

    found = trace("cat.png", ["runs/demo"])
    found["verified"]        # nothing that was found differs

Each link of the chain names the next by hash: the picture its weights, the student its pairs, recipe and teacher, each
data set's manifest its parts and the data set it was made from. A link is `ok`, `differs`, `missing` (not found: say
where with `places`) or `unrecorded` (there, but nothing says what it should be: an older version made it).
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
    """Walks from a picture, a weight file, a student's folder, a run or one of its data sets to what it came from.

    `places` are folders that hold runs or weights, beside those above the file and `runs/` here. `trust` are files of
    certificates (PEM): a picture then must have a C2PA manifest whose signer leads to one of them. UsageError for what
    is no picture of diptych's and no weights; UserError for a picture that cannot be decoded.
    """
    path = refuse_special(Path(file))
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if absent := [str(place) for place in places if not Path(place).is_dir()]:
        raise UsageError(f"--in {absent[0]}: no such folder")
    here = Places(path, [Path(place) for place in places])
    trusted = manifest.read_trust(trust)
    if path.suffix.lower() in KINDS and path.is_file():
        top = _picture(path, here, trusted)
    elif trusted is not None:
        raise UsageError(f"--trust is about who signed a picture, and {path} is none")
    elif (path / "recipe.yaml").is_file():
        top = student(path / "student", here) if (path / "student").is_dir() else Link("run", str(path), "ok", "")
        if top.what == "run":
            top.links = rows(path, ORDER[0], None)
    elif (path / MANIFEST).is_file():
        top = rows(path.resolve().parent, path.resolve().name, None)[0]
    elif path.suffix in (".safetensors", ".sft") or (path.is_dir() and holds_weights(path)):
        top = student(path, here)
    else:
        raise UsageError(f"{path}: no picture (.png, .webp, .jpg), weights (.safetensors, or their folder) or data set")
    links = list(top.all())
    return {"file": str(path), "verified": all(link.status != "differs" for link in links), "chain": asdict(top)}


def links(chain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each link of a chain that `trace` found, from the top."""
    yield chain
    for below in chain["links"]:
        yield from links(below)


def lines(found: dict[str, Any]) -> list[str]:
    """The chain as a tree, one line a link, and what came of it."""
    told: list[str] = []
    statuses: list[str] = []

    def add(link: dict[str, Any], depth: int) -> None:
        statuses.append(link["status"])
        says = f"  {link['says']}" if link["says"] else ""
        told.append(one_line(f"{'  ' * depth}{MARKS[link['status']]} {link['what']}  {link['where']}{says}"))
        for below in link["links"]:
            add(below, depth + 1)

    add(found["chain"], 0)
    counts = {status: statuses.count(status) for status in MARKS}
    words = {"ok": "verified", "differs": "differ", "missing": "not found", "unrecorded": "without a recorded hash"}
    return [*told, ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])]


def _picture(path: Path, here: Places, trust: str | None) -> Link:
    told = read_provenance(path)
    if told is None:
        raise UsageError(
            f"{path}: an image without provenance: diptych did not make it, or another program saved it again"
        )
    broken = broken_seal(path)
    says = f'"{told["prompt"]}"' if told.get("prompt") else f"step {told.get('step')} of a training"
    link = Link("picture", str(path), "unrecorded" if broken is None else "ok", says)
    if broken:
        link.status, link.says = "differs", f"its {' and '.join(broken)} changed since it was drawn"
    link.links += _manifest(path, told, trust)
    if "fingerprints" not in told:  # a sheet of samples, which lies in the training that drew it
        trained = next((p for p in path.resolve().parents if (p / models.TRAINING / "samples").is_dir()), None)
        pairs = told.get("made_from", {}).get("pairs")
        link.links.append(
            student(trained, here, pairs)
            if trained
            else Link("student", "", "missing", "not found; give --in the folder of its run")
        )
        return link
    prints = told["fingerprints"]
    name = str(told.get("model", ""))
    drawer = _drawn_by(name, prints[0] if prints else None, here, told)
    link.links.append(drawer)
    if drawer.status != "missing":
        version = told.get("versions", {}).get("diptych")
        link.links += [_base(print_, name, drawer, version) for print_ in prints[1:] if print_]
    return link


def _manifest(path: Path, told: dict[str, Any], trust: str | None) -> list[Link]:
    """A picture's C2PA manifest, if it has one or should have: who signed it, and whether it is as it was signed."""
    data = path.read_bytes()
    if not holds_manifest(data):
        return [] if trust is None else [Link("manifest", "", "differs", "there is none, and --trust asks for one")]
    if not manifest.is_installed():
        return [Link("manifest", "", "missing", f"of C2PA, not looked at; to verify it: {manifest.EXTRA}")]
    try:
        found = manifest.read(data, kind_of(path), trust)
    except UsageError as error:  # it is installed, and does not load
        return [Link("manifest", "", "missing", str(error))]
    except UserError as error:
        return [Link("manifest", "", "differs", f"it is damaged ({error})")]
    wrong = list(found.wrong)
    if found.provenance is not None and found.provenance != told:
        wrong.append("the picture's text is not what it says")
    if found.trusted is False:
        wrong.append("its signer is on no list of --trust")
    if wrong:
        return [Link("manifest", found.signer, "differs", "; ".join(wrong))]
    says = (
        "its signer is trusted"
        if found.trusted
        else "as it was signed; whether its signer is who it says, --trust FILE tells"
    )
    return [Link("manifest", found.signer, "ok", f"{says}; {found.time}" if found.time else says)]


def _drawn_by(name: str, print_: str | None, here: Places, told: dict[str, Any]) -> Link:
    """The student that a picture names: by its fingerprint, else the one of that name, which then differs."""
    known = here.students()
    with suppress(UserError):  # what is under that name now is not a model
        if (named := model_here(name, "student")) is not None:
            known.insert(0, named)
    if print_ is None:
        match = next((p for p in known if _named(p, name)), None)
        if match is None:
            return Link("student", name, "missing", "above 2 GiB, not hashed when it drew; give --in its folder")
        link = student(match, here)
        link.says += "; above 2 GiB, so the picture does not name its hash"
        link.status = "unrecorded" if link.status == "ok" else link.status
        return link
    for path in known:
        if print_ in (models.fingerprint(path), models.fingerprint(path, training=True)):
            return student(path, here, matched=True)
    match = next((p for p in known if _recorded(p) == print_), None)
    match = match or next((p for p in known if _named(p, name) and _recorded(p) is None), None)
    if match is None or (name in models.BUILT_IN and told.get("versions", {}).get("diptych") != VERSION):
        return Link("student", name, "missing", f"{print_[:12]}… not found; give --in the folder of its run")
    link = student(match, here)
    link.status = "differs"
    link.says = f"its files are not those that drew the picture ({print_[:12]}…); {link.says}"
    return link


def _base(print_: str, name: str, drawn_by: Link, version: str | None) -> Link:
    """The teacher that a student was completed from: the one that came with it, or the one its training names."""
    folder = Path(drawn_by.where)
    named = name if name in models.BUILT_IN else str((origin(folder, folder) or {}).get("teacher", ""))
    try:
        path = model_here(named, "teacher")
    except UserError as error:
        return Link("base", named, "differs", str(error))
    if path is not None:
        if print_ in (models.fingerprint(path), models.fingerprint(path, training=True)):
            return Link("base", named, "ok", "")
        if version == VERSION:
            return Link("base", named, "differs", f"{path} is not {print_[:12]}… that completed the student")
    return Link("base", "", "missing", f"{print_[:12]}… is not on this machine under the name that the student gives")


def _recorded(path: Path) -> str | None:
    """The fingerprint that a student had when its training ended."""
    return (read_json(path, SUMMARY) or {}).get("fingerprint")


def _named(path: Path, name: str) -> bool:
    wanted = Path(name).parts
    if name in models.BUILT_IN:
        return path == models.resolve(name, "student")
    return bool(wanted) and path.resolve().parts[-len(wanted) :] == wanted
