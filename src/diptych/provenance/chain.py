"""The chain of what a student was made from: its training, recipe, pairs, grids and prompts, every hash compared.

A link is `ok`, `differs`, `missing` (not found: say where with `places`) or `unrecorded` (there, but nothing says what
it should be: an older version made it). Nothing is downloaded, and nothing outside the folders is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.data.seal import text_hash
from diptych.data.store import MANIFEST, Dataset, part_name
from diptych.errors import UserError
from diptych.recipe.schema import OWN
from diptych.utils import models
from diptych.utils.documents import parse_json
from diptych.utils.io import sha256, sha256_file
from diptych.utils.paths import inside, refuse_special

ORDER = ("pairs", "candidates", "grids", "prompts")
SUMMARY = f"{models.TRAINING}/summary.json"
MODELS = (("teacher", "teacher"), ("judge", "curator"))
CONFIGS = ("model_index.json", "config.json", "origin.json")
WEIGHTS = (".safetensors", ".sft", ".gguf")
UP = 6  # folders above a file that are looked at


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


class Places:
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
    """Whether a folder is a model's, or a training's."""
    inside = [folder, folder / "transformer"]
    return any(p.is_dir() and any(p.glob("*.safetensors")) for p in inside) or (folder / "origin.json").is_file()


def student(path: Path, here: Places, pairs: str | None = None, matched: bool = False) -> Link:
    """A student's files and its training, and below it the run it came from. `pairs` are those that it must name,
    `matched` says that its files are known to be the right ones."""
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
    told = origin(path, folder)
    made_by = stored.get("made_by", {})
    for key in ("base", "pairs"):
        if told and made_by and told.get(key) != made_by.get(key):
            says = f"it and {folder / 'origin.json'} name other {key}"
            link.links.append(Link("training", str(summary), "differs", says))
    told = told or made_by
    if not told:
        link.says = link.says or "nothing here says what it was trained on"
        return link
    run = _run_of(folder, told, here)
    steps = told.get("steps") or stored.get("summary", {}).get("steps")
    where = str(run) if run else str(told.get("name", ""))
    if run is None:
        link.links.append(Link("run", where, "missing", f"{steps} steps; not found; give --in the folder of its run"))
        return link
    training = Link("run", where, "ok", f"{steps} steps")
    training.links.append(_recipe(run, told.get("recipe_sha256")))
    data = made_by.get("distill", {}).get("data") or []
    others = [str(each["path"]) for each in data if each["path"] != OWN]
    if len(others) == len(data) and data:
        own = []  # it was trained on no pairs of its run
    else:
        # With other people's data beside them the hash is of all together, which is not taken apart here.
        alone = bool(made_by) and not data
        own = rows(run, "pairs", told.get("pairs_manifest"), (pairs or told.get("pairs")) if alone else None)
    training.links += own
    training.links += [Link("data", path, "unrecorded", "other people's pairs, not followed") for path in others]
    link.links.append(training)
    return link


def origin(path: Path, folder: Path) -> dict[str, Any] | None:
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


def _run_of(folder: Path, told: dict[str, Any], here: Places) -> Path | None:
    """The run that trained a student: the one it lies in, or the one whose pairs or recipe it names."""
    if _is_run(folder.parent):
        return folder.parent
    for run in here.runs:
        data = Dataset(run / "pairs")
        if _sha(run / "pairs", MANIFEST) == told.get("pairs_manifest", "-"):
            return run
        if _sha(run, "recipe.yaml") == told.get("recipe_sha256", "-"):
            return run
        try:
            if data.is_complete() and data.fingerprint() == told.get("pairs"):
                return run
        except UserError:
            continue
    return None


def _recipe(run: Path, sha256: str | None) -> Link:
    path, found = run / "recipe.yaml", _sha(run, "recipe.yaml")
    if found is None:
        return Link("recipe", str(path), "missing", "not there")
    if sha256 is None:
        return Link("recipe", str(path), "unrecorded", "the student does not name its hash")
    same = found == sha256
    return Link("recipe", str(path), "ok" if same else "differs", "" if same else "not the one it was trained by")


def rows(run: Path, name: str, manifest_sha256: str | None, print_: str | None = None) -> list[Link]:
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
    said = sha256(json.dumps([sha for _, sha in parts]))
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
        link.links += rows(run, following, inputs.get(following))
    return [link]


def _model(kind: str, role: str, manifest: dict[str, Any]) -> Link:
    """The teacher or the judge that made rows, if it is on this machine; nothing is downloaded."""
    name, wanted = str(manifest.get(kind, "")), str(manifest[f"{kind}_sha256"])
    try:
        path = model_here(name, role)
        if path is None:
            return Link(kind, name, "missing", f"{wanted[:12]}… is not on this machine under that name")
        same = wanted in (models.fingerprint(path), models.fingerprint(path, training=True))
    except (UserError, OSError) as error:
        return Link(kind, name, "differs", str(error))
    return Link(kind, name, "ok" if same else "differs", "" if same else f"{path} is not {wanted[:12]}… any more")


def model_here(name: str, role: str) -> Path | None:
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


def changed(path: Path) -> list[str]:
    """The files of a student that are not those its training wrote."""
    files = (read_json(path, SUMMARY) or {}).get("files")
    if not isinstance(files, dict):
        return []
    now = models.files(path)
    return [name for name, sha in files.items() if now.get(name) != sha]


def _sha(folder: Path, name: str) -> str | None:
    """sha256 of a file in a folder; None if there is no such regular file inside it."""
    try:
        return sha256_file(inside(folder, name))
    except (OSError, UserError):
        return None


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder; None if there is no such regular file inside it, or no object in it."""
    try:
        found = parse_json(inside(folder, name).read_text("utf8"))
    except (OSError, ValueError, UserError):
        return None
    return found if isinstance(found, dict) else None
