"""From a picture or a student back to the grids it came from, every hash on the way compared.

    found = trace("cat.png", ["runs/demo"])
    found["verified"]        # nothing that was found differs

Each link of the chain names the next by hash: the picture its weights, the student its pairs, recipe and teacher, each
data set's manifest its parts and the data set it was made from. A link is `ok`, `differs`, `missing` (not found: say
where with `places`) or `unrecorded` (there, but nothing says what it should be: an older version made it).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diptych.data.images import KINDS, broken_seal, kind_of, read_provenance
from diptych.data.seal import holds_manifest, text_hash
from diptych.data.store import MANIFEST, Dataset, part_name
from diptych.errors import UsageError, UserError
from diptych.provenance import manifest
from diptych.recipe.schema import OWN
from diptych.utils import models
from diptych.utils.console import one_line
from diptych.utils.documents import parse_json
from diptych.utils.paths import inside, refuse_special

ORDER = ("pairs", "candidates", "grids", "prompts")
SUMMARY = f"{models.TRAINING}/summary.json"
MODELS = (("teacher", "teacher"), ("judge", "curator"))
CONFIGS = ("model_index.json", "config.json", "origin.json")
WEIGHTS = (".safetensors", ".sft", ".gguf")
UP = 6  # folders above a file that are looked at
MARKS = {"ok": "✓", "differs": "✗", "missing": "?", "unrecorded": "–"}


@dataclass
class Link:
    """One artefact of the chain; `links` are what it was made from."""

    what: str
    where: str
    status: str
    says: str
    links: list[Link] = field(default_factory=list)

    def all(self) -> Iterator[Link]:
        """This one and all below it."""
        yield self
        for link in self.links:
            yield from link.all()


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
    here = _Places(path, [Path(place) for place in places])
    trusted = manifest.read_trust(trust)
    if path.suffix.lower() in KINDS and path.is_file():
        top = _picture(path, here, trusted)
    elif trusted is not None:
        raise UsageError(f"--trust is about who signed a picture, and {path} is none")
    elif (path / "recipe.yaml").is_file():
        top = _student(path / "student", here) if (path / "student").is_dir() else Link("run", str(path), "ok", "")
        if top.what == "run":
            top.links = _rows(path, ORDER[0], None)
    elif (path / MANIFEST).is_file():
        top = _rows(path.resolve().parent, path.resolve().name, None)[0]
    elif path.suffix in (".safetensors", ".sft") or (path.is_dir() and holds_weights(path)):
        top = _student(path, here)
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


# Where things lie ----------------------------------------------------------------------------------------------------


class _Places:
    """The run folders and weight folders that may be upstream."""

    def __init__(self, file: Path, given: Sequence[Path]) -> None:
        above = list(file.resolve().parents)[:UP]
        near = [*given, *above, *(p / "runs" for p in above), Path("runs")]
        folders = [
            *near,
            *(child for place in [*given, *(p for p in near if p.name == "runs")] for child in _in(place)),
        ]
        self.folders = list({p.resolve(): p for p in folders if p.is_dir()}.values())
        self.runs = [p for p in self.folders if _is_run(p)]

    def students(self) -> list[Path]:
        """Folders with weights: those of runs, then others."""
        own = [run / "student" for run in self.runs if (run / "student").is_dir()]
        return [*own, *(p for p in self.folders if p not in self.runs and holds_weights(p))]


def _in(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return [*found, *(p / "runs" for p in found if (p / "runs").is_dir())]


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or any((folder / name / MANIFEST).is_file() for name in ORDER)


def holds_weights(folder: Path) -> bool:
    inside = [folder, folder / "transformer"]
    return any(p.is_dir() and any(p.glob("*.safetensors")) for p in inside) or (folder / "origin.json").is_file()


# Picture and student -------------------------------------------------------------------------------------------------


def _picture(path: Path, here: _Places, trust: str | None) -> Link:
    told = read_provenance(path)
    if told is None:
        raise UsageError(
            f"{path}: a picture that does not say what made it; diptych did not draw it, or it was saved anew"
        )
    broken = broken_seal(path)
    says = f'"{told["prompt"]}"' if told.get("prompt") else f"step {told.get('step')} of a training"
    link = Link("picture", str(path), "unrecorded" if broken is None else "ok", says)
    if broken:
        link.status, link.says = "differs", f"its {' and '.join(broken)} changed since it was drawn"
    link.links += _manifest(path, told, trust)
    if "fingerprints" not in told:  # a sheet of samples, which lies in the training that drew it
        student = next((p for p in path.resolve().parents if (p / models.TRAINING / "samples").is_dir()), None)
        pairs = told.get("made_from", {}).get("pairs")
        link.links.append(
            _student(student, here, pairs)
            if student
            else Link("student", "", "missing", "not found; give --in the folder of its run")
        )
        return link
    prints = told["fingerprints"]
    name = str(told.get("model", ""))
    student = _drawn_by(name, prints[0] if prints else None, here, told)
    link.links.append(student)
    if student.status != "missing":
        version = told.get("versions", {}).get("diptych")
        link.links += [_base(print_, name, student, version) for print_ in prints[1:] if print_]
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


def _drawn_by(name: str, print_: str | None, here: _Places, told: dict[str, Any]) -> Link:
    """The student that a picture names: by its fingerprint, else the one of that name, which then differs."""
    known = here.students()
    with suppress(UserError):  # what is under that name now is not a model
        if (named := _model_here(name, "student")) is not None:
            known.insert(0, named)
    if print_ is None:
        match = next((p for p in known if _named(p, name)), None)
        if match is None:
            return Link("student", name, "missing", "above 2 GiB, not hashed when it drew; give --in its folder")
        link = _student(match, here)
        link.says += "; above 2 GiB, so the picture does not name its hash"
        link.status = "unrecorded" if link.status == "ok" else link.status
        return link
    for path in known:
        if print_ in (models.fingerprint(path), models.fingerprint(path, training=True)):
            return _student(path, here, matched=True)
    match = next((p for p in known if _recorded(p) == print_), None)
    match = match or next((p for p in known if _named(p, name) and _recorded(p) is None), None)
    if match is None or (name in models.BUILT_IN and told.get("versions", {}).get("diptych") != _version()):
        return Link("student", name, "missing", f"{print_[:12]}… not found; give --in the folder of its run")
    link = _student(match, here)
    link.status = "differs"
    link.says = f"its files are not those that drew the picture ({print_[:12]}…); {link.says}"
    return link


def _base(print_: str, drawer: str, student: Link, version: str | None) -> Link:
    """The teacher that a student was completed from: the one that came with it, or the one its training names."""
    folder = Path(student.where)
    names = [drawer] if drawer in models.BUILT_IN else [str((_origin(folder, folder) or {}).get("teacher", ""))]
    for name in names:
        try:
            path = _model_here(name, "teacher")
        except UserError as error:
            return Link("base", name, "differs", str(error))
        if path is not None:
            if print_ in (models.fingerprint(path), models.fingerprint(path, training=True)):
                return Link("base", name, "ok", "")
            if version == _version():
                return Link("base", name, "differs", f"{path} is not {print_[:12]}… that completed the student")
    return Link("base", "", "missing", f"{print_[:12]}… is not on this machine under the name that the student gives")


def _recorded(path: Path) -> str | None:
    """The fingerprint that a student had when its training ended."""
    return (read_json(path, SUMMARY) or {}).get("fingerprint")


def _named(path: Path, name: str) -> bool:
    wanted = Path(name).parts
    if name in models.BUILT_IN:
        return path == models.resolve(name, "student")
    return bool(wanted) and path.resolve().parts[-len(wanted) :] == wanted


def _version() -> str:
    from diptych.utils.machine import VERSION

    return VERSION


def changed(path: Path) -> list[str]:
    """The files of a student that are not those its training wrote."""
    files = (read_json(path, SUMMARY) or {}).get("files")
    if not isinstance(files, dict):
        return []
    now = models.files(path)
    return [name for name, sha in files.items() if now.get(name) != sha]


def _student(path: Path, here: _Places, pairs: str | None = None, matched: bool = False) -> Link:
    folder = path if path.is_dir() else path.parent
    if folder.name == "transformer" and not (folder / "origin.json").is_file():
        folder = folder.parent
    link = Link("student", str(folder), "ok" if matched else "unrecorded", "the one that drew it" if matched else "")
    summary = folder / SUMMARY
    stored = read_json(folder, SUMMARY) if summary.exists() else {}
    if stored is None:
        link.links.append(Link("training", str(summary), "differs", "it is not valid JSON in a regular file"))
        stored = {}
    sealed = "sha256" in stored or "files" in stored  # what lists files was always sealed: else its seal is gone
    if sealed and stored.get("sha256") != text_hash({k: v for k, v in stored.items() if k != "sha256"}):
        link.links.append(Link("training", str(summary), "differs", "changed since training"))
    if others := changed(folder):
        link.status, link.says = "differs", f"changed since training: {', '.join(others)}"
    elif stored.get("files"):
        link.status = "ok"
        link.says = link.says or "its files are those that training wrote"
    origin = _origin(path, folder)
    made_by = stored.get("made_by", {})
    for key in ("base", "pairs"):
        if origin and made_by and origin.get(key) != made_by.get(key):
            says = f"it and {folder / 'origin.json'} name other {key}"
            link.links.append(Link("training", str(summary), "differs", says))
    origin = origin or made_by
    if not origin:
        link.says = link.says or "nothing here says what it was trained on"
        return link
    run = _run_of(folder, origin, here)
    steps = origin.get("steps") or stored.get("summary", {}).get("steps")
    where = str(run) if run else str(origin.get("name", ""))
    if run is None:
        link.links.append(Link("run", where, "missing", f"{steps} steps; not found; give --in the folder of its run"))
        return link
    training = Link("run", where, "ok", f"{steps} steps")
    training.links.append(_recipe(run, origin.get("recipe_sha256")))
    data = made_by.get("distill", {}).get("data") or []
    others = [str(each["path"]) for each in data if each["path"] != OWN]
    if len(others) == len(data) and data:
        own = []  # it was trained on no pairs of its run
    else:
        # With other people's data beside them the hash is of all together, which is not taken apart here.
        alone = bool(made_by) and not data
        own = _rows(run, "pairs", origin.get("pairs_manifest"), (pairs or origin.get("pairs")) if alone else None)
    training.links += own
    training.links += [Link("data", path, "unrecorded", "other people's pairs, not followed") for path in others]
    link.links.append(training)
    return link


def _origin(path: Path, folder: Path) -> dict[str, Any] | None:
    """What a student says it was made from: in `origin.json`, or in the header of a control-LoRA's file."""
    if (folder / "origin.json").is_file():
        return read_json(folder, "origin.json")
    file = path if path.is_file() else next((p for p in sorted(folder.glob("*.safetensors")) if p.is_file()), None)
    if file is None:
        return None
    from diptych.student.weights.tensors import open_safetensors

    try:
        told = parse_json((open_safetensors(file)[1] or {}).get("diptych", "{}"))
    except (UserError, ValueError):
        return None
    return told if "pairs" in told else None


def _run_of(folder: Path, origin: dict[str, Any], here: _Places) -> Path | None:
    """The run that trained a student: the one it lies in, or the one whose pairs or recipe it names."""
    if _is_run(folder.parent):
        return folder.parent
    for run in here.runs:
        data = Dataset(run / "pairs")
        if _sha(run / "pairs", MANIFEST) == origin.get("pairs_manifest", "-"):
            return run
        if _sha(run, "recipe.yaml") == origin.get("recipe_sha256", "-"):
            return run
        try:
            if data.is_complete() and data.fingerprint() == origin.get("pairs"):
                return run
        except UserError:
            continue
    return None


# Data sets -----------------------------------------------------------------------------------------------------------


def _recipe(run: Path, sha256: str | None) -> Link:
    path, found = run / "recipe.yaml", _sha(run, "recipe.yaml")
    if found is None:
        return Link("recipe", str(path), "missing", "not there")
    if sha256 is None:
        return Link("recipe", str(path), "unrecorded", "the student does not name its hash")
    same = found == sha256
    return Link("recipe", str(path), "ok" if same else "differs", "" if same else "not the one it was trained by")


def _rows(run: Path, name: str, manifest_sha256: str | None, print_: str | None = None) -> list[Link]:
    """A data set of a run, its parts, its models, and, below it, the one that it was made from."""
    folder = run / name
    path = folder / MANIFEST
    if not path.is_file():
        return [Link(name, str(folder), "missing", "not there, or unfinished")]
    data = Dataset(folder)
    link = Link(name, str(folder), "ok", "")
    wrong = []
    if manifest_sha256 is not None and _sha(folder, MANIFEST) != manifest_sha256:
        wrong.append(f"{MANIFEST} is not the one named by what was made from it")
    try:
        manifest = data.manifest
        assert manifest is not None
        parts = [(part_name(part["name"]), str(part["sha256"])) for part in manifest["parts"]]
        link.says = f"{manifest['rows']} rows, {len(parts)} parts"
        inputs = dict(manifest.get("inputs", {}))
    except (UserError, KeyError, TypeError, ValueError):
        link.status, link.says = "differs", f"{MANIFEST} is damaged"
        inputs, parts, manifest = {}, [], {}
    for part, sha in parts:
        found = _sha(folder, part)
        if found != sha:
            absent = "missing" if not os.path.lexists(folder / part) else "not a regular file of the data set's folder"
            wrong.append(f"{part} is {absent if found is None else 'not the file its manifest names'}")
    said = hashlib.sha256(json.dumps([sha for _, sha in parts]).encode()).hexdigest()
    if manifest_sha256 is None and print_ is not None and print_ != said:
        wrong.append("not the pairs that the student was trained on")
    if wrong:
        link.status, link.says = "differs", "; ".join(wrong)
    elif link.status == "ok" and manifest_sha256 is None and print_ is None:
        link.says += "; as its manifest says"
    link.links += [_model(kind, role, manifest) for kind, role in MODELS if f"{kind}_sha256" in manifest]
    following = next((key for key in inputs if key in ORDER), None)
    if following is None and name in ORDER[:-1] and "imported" not in manifest:
        following = ORDER[ORDER.index(name) + 1]  # the manifest no longer says, or never did
    if following is not None:
        link.links += _rows(run, following, inputs.get(following))
    return [link]


def _model(kind: str, role: str, manifest: dict[str, Any]) -> Link:
    """The teacher or the judge that made rows, if it is on this machine; nothing is downloaded."""
    name, wanted = str(manifest.get(kind, "")), str(manifest[f"{kind}_sha256"])
    try:
        path = _model_here(name, role)
        if path is None:
            return Link(kind, name, "missing", f"{wanted[:12]}… is not on this machine under that name")
        same = wanted in (models.fingerprint(path), models.fingerprint(path, training=True))
    except (UserError, OSError) as error:
        return Link(kind, name, "differs", str(error))
    return Link(kind, name, "ok" if same else "differs", "" if same else f"{path} is not {wanted[:12]}… any more")


def _model_here(name: str, role: str) -> Path | None:
    """The model that a file names, if this machine has it under that name; nothing is downloaded.

    UserError for a path that holds no model: hashing a device, or a whole disk, would not end.
    """
    if name in models.BUILT_IN:
        return models.resolve(name, role)
    try:
        path = Path(name).expanduser()
        if not name or not path.exists():
            return None
    except (OSError, ValueError, RuntimeError):  # a name that cannot be a path, or a home that is not there
        return None
    if path.is_dir():
        held = [path, *(path / inner for inner in ("transformer", "student"))]
        files = [each for one in held if one.is_dir() for each in one.iterdir()]
    else:
        files = [refuse_special(path)]
    if not any(each.name in CONFIGS or each.suffix in WEIGHTS for each in files):
        raise UserError(f"{path} holds no model")
    return models.resolve(name, role)


def _sha(folder: Path, name: str) -> str | None:
    """sha256 of a file in a folder; None if there is no such regular file inside it."""
    try:
        with inside(folder, name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, UserError):
        return None


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder; None if there is no such regular file inside it, or no object in it."""
    try:
        found = parse_json(inside(folder, name).read_text("utf8"))
    except (OSError, ValueError, UserError):
        return None
    return found if isinstance(found, dict) else None
