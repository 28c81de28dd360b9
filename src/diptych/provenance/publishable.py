"""Selects what may be published of a student or a dataset: files with a recorded hash, and a card with a license.

A student's files are those that its training recorded, and a dataset's are the parts of its manifest. Other files in
the folder (checkpoints, notes, failed rows) are not published. An export is published whole, except for hidden files,
after its data is verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diptych.data.interop import card, exporting
from diptych.data.seal import text_hash
from diptych.data.store import MANIFEST, Dataset, part_name
from diptych.errors import UsageError, UserError
from diptych.provenance import chain, trace
from diptych.utils import models
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.io import sha256
from diptych.utils.paths import files_inside, inside

CARD = "README.md"
SUMMARY = chain.SUMMARY
# Files of two pushes must not be read as one dataset or one model.
_READ_TOGETHER = (".parquet", ".tar", ".safetensors")
_LEGAL = re.compile(r"\n## Licen[cs]e\n\n")  # earlier cards have the British spelling


@dataclass(frozen=True)
class Publication:
    """The files to publish, by their name in the target: a path on this machine, or the bytes."""

    kind: str  # "model" or "dataset", as the hub has it
    files: dict[str, Path | bytes]
    card: str

    def size(self, name: str) -> int:
        """The size of a file in bytes."""
        file = self.files[name]
        return len(file) if isinstance(file, bytes) else file.stat().st_size


def check_target(present: list[str], made: Publication) -> None:
    """UserError if the target has data or weights that are not in this push, because readers would load both."""
    others = sorted(name for name in present if name.endswith(_READ_TOGETHER) and name not in made.files)
    if others:
        raise UserError(
            "publish_refused",
            f"The target has {others[0]}, which is not in this push and would be loaded with it. Remove it there, or "
            "choose another target.",
        )


def ordered(names: Iterable[str]) -> list[str]:
    """The names with weights and parts first, and the files that mark the push as complete last."""
    last = (SUMMARY, exporting.MADE, MANIFEST, CARD)
    return sorted(names, key=lambda name: (last.index(name) if name in last else -1, name))


def material(source: str | Path, license: str = "") -> Publication:
    """The checked files of a run (its student), a student, a dataset of a run, an import, or an export."""
    path = Path(source).expanduser()
    if not path.is_dir():
        code = "path_wrong_kind" if path.exists() else "path_not_found"
        raise UsageError(code, f"{path} is not a folder. Push a run, its student/, or its pairs/.")
    if (path / "recipe.yaml").is_file() and not (path / MANIFEST).is_file():
        if not (path / "student").is_dir():
            message = f"{path} has no student yet. Push {path / 'pairs'}, or run `diptych distill` first."
            raise UsageError("run_incomplete", message)
        path = path / "student"
    if (path / MANIFEST).is_file():
        return _rows(path, license)
    if (path / exporting.MADE).is_file():
        return _export(path, license)
    if chain.holds_weights(path):
        return _student(path, license)
    raise UsageError(
        "path_wrong_kind",
        f"{path} is not a run, student, dataset, or export: it has no recipe.yaml, weights, {MANIFEST}, or "
        f"{exporting.MADE}.",
    )


def _student(path: Path, license: str) -> Publication:
    edited = chain.changed(path) == [CARD]  # people may edit the card
    _verify(path, except_card=edited)
    summary = chain.read_json(path, SUMMARY)
    if not summary or not summary.get("files"):
        raise UserError(
            "publish_refused",
            f"{path}: {SUMMARY} has no hashes of the files, so the origin of the student is unknown. Push the student "
            "as `diptych distill` wrote it.",
        )
    files: dict[str, Path | bytes] = {name: inside(path, name) for name in summary["files"]}
    original = _read_card(path)
    text = _licensed(original, license, path)
    files[SUMMARY] = inside(path, SUMMARY)
    changed = {name: text.encode() for name in (CARD,) if edited or text != original}
    for name in summary["files"]:
        # Students of earlier versions contain folder names of the machine that trained them.
        if name.endswith(".json") and (clean := models.without_places(data := inside(path, name).read_bytes())) != data:
            changed[name] = clean
    if changed:
        files |= changed
        # The record of the copy has the hashes of the changed files.
        summary["files"] |= {name: sha256(data) for name, data in changed.items()}
        if changed.keys() - {CARD}:
            made = Publication("model", files, text)
            names = sorted((name for name in summary["files"] if name.endswith((".safetensors", ".json"))), key=Path)
            entries = ((name, made.size(name), summary["files"][name]) for name in names)
            summary["fingerprint"] = models.fingerprint_of(entries)
        summary["sha256"] = text_hash({key: value for key, value in summary.items() if key != "sha256"})
        files[SUMMARY] = (json.dumps(summary, indent=2) + "\n").encode()
    return Publication("model", files, text)


def _rows(path: Path, license: str) -> Publication:
    manifest = chain.read_json(path, MANIFEST)
    try:
        names = [part_name(part["name"]) for part in (manifest or {})["parts"]]
    except (KeyError, TypeError, UserError) as error:
        why = f" ({error})" if isinstance(error, UserError) else ""
        message = f"{path / MANIFEST} is damaged{why}. Run the command that made {path} again."
        raise UserError("store_damaged", message) from None
    _verify(path)
    text = _read_card(path) if (path / CARD).is_file() else card.of_rows(Dataset(path))
    text = _licensed(text, license, path)
    files: dict[str, Path | bytes] = {name: inside(path, name) for name in (*names, MANIFEST)}
    return Publication("dataset", {**files, CARD: text.encode()}, text)


def _export(path: Path, license: str) -> Publication:
    exporting.check(path)
    text = _licensed(_read_card(path), license, path)
    names = {p.relative_to(path): p for p in files_inside(path) if not p.is_symlink()}
    files: dict[str, Path | bytes] = {
        name.as_posix(): p for name, p in names.items() if not any(part.startswith(".") for part in name.parts)
    }
    return Publication("dataset", {**files, CARD: text.encode()}, text)


def _verify(path: Path, except_card: bool = False) -> None:
    """UserError with the first link of the chain that differs."""
    links = list(trace.links(trace.trace(path)["chain"]))
    for link in links[1 if except_card else 0 :]:
        if link["status"] == "differs":
            message = f"{path} cannot be published: {link['what']} {link['where']}: {link['says']}."
            raise UserError("publish_refused", f"{message} See the chain with `diptych trace`.")


def _read_card(path: Path) -> str:
    try:
        return read_text(inside(path, CARD))
    except UsageError:
        raise
    except UserError:
        message = f"{path}: its card {CARD} cannot be read. Run the command that made the folder again."
        raise UserError("publish_refused", message) from None


def _licensed(text: str, license: str, path: Path) -> str:
    """The card with its license, or else the given one. UserError if there is none or if they differ."""
    import yaml

    head, front, body = ["", "", ""]
    try:
        head, front, body = text.split("---\n", 2)
        fields = parse_yaml(front, str(path / CARD))
    except ValueError:
        fields = None
    if head or not isinstance(fields, dict):
        message = f"{path / CARD} does not start with front matter (--- … ---). Run the command that made it again."
        raise UserError("publish_refused", message)
    known = fields.get("license") if fields.get("license") != "other" else fields.get("license_name")
    if known:
        if license and license != known:
            message = f"--license {license}: {path} inherits the license {known}. Leave --license out."
            raise UserError("license_conflict", message)
        return text
    if not license:
        raise UserError(
            "publish_refused",
            f"{path} states no license, and neither do its inputs. Look it up and pass it with --license (apache-2.0, "
            "cc-by-4.0, …).",
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license) or license in ("other", "unknown"):
        message = f"--license {license} is not a license id of the hub, such as apache-2.0, mit, or cc-by-4.0."
        raise UsageError("option_invalid", message)
    fields = {key: value for key, value in fields.items() if not key.startswith("license")}
    front = yaml.safe_dump({"license": license, **fields}, sort_keys=False, allow_unicode=True)
    if heading := _LEGAL.search(body):
        body = f"{body[: heading.end()]}{license}, as whoever published it says.\n"
    return f"---\n{front}---\n{body}"
