"""The chain of a student's origins: its training, recipe, pairs, grids, and prompts, with every hash compared.

A link is `ok`, `differs`, `missing` (not found; name its folder with `places`), or `unrecorded` (present, but without a
recorded hash, because an older version made it). Nothing is downloaded, and nothing outside the folders is read.
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
UP = 6  # folders above a file that are searched


@dataclass
class Link:
    """One artifact of the chain; `links` are its inputs."""

    what: str
    where: str
    status: str
    says: str
    links: list[Link] = field(default_factory=list)

    def all(self) -> Iterator[Link]:
        """This link and all below it."""
        yield self
        for link in self.links:
            yield from link.all()


class Places:
    """The run folders and weight folders to search for origins."""

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
        of_runs = [run / "student" for run in self.runs if (run / "student").is_dir()]
        return [*of_runs, *(p for p in self.folders if p not in self.runs and holds_weights(p))]


def _in(folder: Path) -> list[Path]:
    inner = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return [*inner, *(p / "runs" for p in inner if (p / "runs").is_dir())]


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or any((folder / name / MANIFEST).is_file() for name in ORDER)


def holds_weights(folder: Path) -> bool:
    """Whether a folder is that of a model or of a training."""
    inside = [folder, folder / "transformer"]
    return any(p.is_dir() and any(p.glob("*.safetensors")) for p in inside) or (folder / "origin.json").is_file()


def student(path: Path, here: Places, pairs: str | None = None, matched: bool = False) -> Link:
    """The link of a student's files and training, with its run below it.

    Args:
        pairs: fingerprint of the pairs that it must name.
        matched: whether its files are already known to be the right ones.
    """
    folder = path if path.is_dir() else path.parent
    if folder.name == "transformer" and not (folder / "origin.json").is_file():
        folder = folder.parent
    link = Link(
        "student", str(folder), "ok" if matched else "unrecorded", "the one that generated it" if matched else ""
    )
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
    source = origin(path, folder)
    made_by = stored.get("made_by", {})
    for key in ("base", "pairs"):
        if source and made_by and source.get(key) != made_by.get(key):
            says = f"it and {folder / 'origin.json'} name other {key}"
            link.links.append(Link("training", str(summary), "differs", says))
    source = source or made_by
    if not source:
        link.says = link.says or "no record of what it was trained on"
        return link
    run = _run_of(folder, source, here)
    steps = source.get("steps") or stored.get("summary", {}).get("steps")
    where = str(run) if run else str(source.get("name", ""))
    if run is None:
        link.links.append(
            Link("run", where, "missing", f"{steps} steps; not found; pass the folder of its run with --in")
        )
        return link
    training = Link("run", where, "ok", f"{steps} steps")
    training.links.append(_recipe(run, source.get("recipe_sha256")))
    data = made_by.get("distill", {}).get("data") or []
    others = [str(each["path"]) for each in data if each["path"] != OWN]
    if len(others) == len(data) and data:
        of_run = []  # it was trained on other people's pairs only
    else:
        # If other people's data was used too, the recorded hash covers all of it and cannot be compared here.
        alone = bool(made_by) and not data
        of_run = rows(run, "pairs", source.get("pairs_manifest"), (pairs or source.get("pairs")) if alone else None)
    training.links += of_run
    training.links += [Link("data", path, "unrecorded", "other people's pairs, not followed") for path in others]
    link.links.append(training)
    return link


def origin(path: Path, folder: Path) -> dict[str, Any] | None:
    """The recorded origin of a student, from `origin.json` or from the header of a control LoRA's file."""
    if (folder / "origin.json").is_file():
        return read_json(folder, "origin.json")
    file = path if path.is_file() else next((p for p in sorted(folder.glob("*.safetensors")) if p.is_file()), None)
    if file is None:
        return None
    from diptych.student.weights.tensors import open_safetensors

    try:
        source = parse_json((open_safetensors(file)[1] or {}).get("diptych", "{}"))
    except (UserError, ValueError):
        return None
    return source if "pairs" in source else None


def _run_of(folder: Path, source: dict[str, Any], here: Places) -> Path | None:
    """The run that trained a student: the one that contains it, or the one whose pairs or recipe it names."""
    if _is_run(folder.parent):
        return folder.parent
    for run in here.runs:
        data = Dataset(run / "pairs")
        if _sha(run / "pairs", MANIFEST) == source.get("pairs_manifest", "-"):
            return run
        if _sha(run, "recipe.yaml") == source.get("recipe_sha256", "-"):
            return run
        try:
            if data.is_complete() and data.fingerprint() == source.get("pairs"):
                return run
        except UserError:
            continue
    return None


def _recipe(run: Path, sha256: str | None) -> Link:
    path, current = run / "recipe.yaml", _sha(run, "recipe.yaml")
    if current is None:
        return Link("recipe", str(path), "missing", "not there")
    if sha256 is None:
        return Link("recipe", str(path), "unrecorded", "the student does not name its hash")
    same = current == sha256
    return Link("recipe", str(path), "ok" if same else "differs", "" if same else "not the one it was trained by")


def rows(run: Path, name: str, manifest_sha256: str | None, fingerprint: str | None = None) -> list[Link]:
    """The link of a run's dataset with its parts and models, and below it the dataset that it was made from."""
    folder = run / name
    path = folder / MANIFEST
    if not path.is_file():
        return [Link(name, str(folder), "missing", "not there, or unfinished")]
    data = Dataset(folder)
    link = Link(name, str(folder), "ok", "")
    wrong = []
    if manifest_sha256 is not None and _sha(folder, MANIFEST) != manifest_sha256:
        wrong.append(f"{MANIFEST} is not the one that later stages recorded")
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
        current = _sha(folder, part)
        if current != sha:
            absent = "missing" if not os.path.lexists(folder / part) else "not a regular file of the dataset's folder"
            wrong.append(f"{part} is {absent if current is None else 'not the file its manifest names'}")
    listed = sha256(json.dumps([sha for _, sha in parts]))
    if manifest_sha256 is None and fingerprint is not None and fingerprint != listed:
        wrong.append("not the pairs that the student was trained on")
    if wrong:
        link.status, link.says = "differs", "; ".join(wrong)
    elif link.status == "ok" and manifest_sha256 is None and fingerprint is None:
        link.says += "; as in its manifest"
    link.links += [_model(kind, role, manifest) for kind, role in MODELS if f"{kind}_sha256" in manifest]
    following = next((key for key in inputs if key in ORDER), None)
    if following is None and name in ORDER[:-1] and "imported" not in manifest:
        following = ORDER[ORDER.index(name) + 1]  # the manifest does not record it
    if following is not None:
        link.links += rows(run, following, inputs.get(following))
    return [link]


def _model(kind: str, role: str, manifest: dict[str, Any]) -> Link:
    """The link of the teacher or judge that made rows, if it is on this machine; nothing is downloaded."""
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

    UserError for a path without a model: hashing a device or a whole disk would not end.
    """
    if name in models.BUILT_IN:
        return models.resolve(name, role)
    try:
        path = Path(name).expanduser()
        if not name or not path.exists():
            return None
    except (OSError, ValueError, RuntimeError):  # the name cannot be a path, or the home folder is unknown
        return None
    if path.is_dir():
        folders = [path, *(path / inner for inner in ("transformer", "student"))]
        files = [each for folder in folders if folder.is_dir() for each in folder.iterdir()]
    else:
        files = [refuse_special(path)]
    if not any(each.name in CONFIGS or each.suffix in WEIGHTS for each in files):
        raise UserError("model_not_found", f"{path} has no model.")
    return models.resolve(name, role)


def changed(path: Path) -> list[str]:
    """The files of a student that changed since its training."""
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
        value = parse_json(inside(folder, name).read_text("utf8"))
    except (OSError, ValueError, UserError):
        return None
    return value if isinstance(value, dict) else None
