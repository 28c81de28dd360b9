"""What may be published of a student or a data set: its files with a recorded hash, and a card that states a licence.

A student's files are those that its training named, a data set's the parts of its manifest; what else lies in the
folder stays here: checkpoints, notes, failed rows. An export goes whole (but for hidden files), once its data read back
as they were verified.
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
# Two pushes of one name must not be read as one data set or one model.
_READ_TOGETHER = (".parquet", ".tar", ".safetensors")
_LEGAL = "\n## Licence\n\n"


@dataclass(frozen=True)
class Material:
    """What goes out: `files` by their name there, a path of this machine or the bytes themselves."""

    kind: str  # "model" or "dataset", as the hub has it
    files: dict[str, Path | bytes]
    card: str

    def size(self, name: str) -> int:
        """Bytes of a file."""
        held = self.files[name]
        return len(held) if isinstance(held, bytes) else held.stat().st_size


def stale(there: list[str], made: Material) -> None:
    """UserError where the target holds data or weights that are not in this push: readers would take both as one."""
    others = sorted(name for name in there if name.endswith(_READ_TOGETHER) and name not in made.files)
    if others:
        raise UserError(
            f"the target holds {others[0]}, which is not in this push; who loads it would get both: remove it there, "
            "or choose another target"
        )


def ordered(names: Iterable[str]) -> list[str]:
    """Weights and parts first; what says that all is there comes last."""
    last = (SUMMARY, exporting.MADE, MANIFEST, CARD)
    return sorted(names, key=lambda name: (last.index(name) if name in last else -1, name))


# What is published ---------------------------------------------------------------------------------------------------


def material(source: str | Path, licence: str = "") -> Material:
    """The files of a run (its student), a student's folder, a data set of a run, an import or an export; checked."""
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UsageError(
            f"{path}: {'not a' if path.exists() else 'no such'} folder; push a run, its student/ or pairs/"
        )
    if (path / "recipe.yaml").is_file() and not (path / MANIFEST).is_file():
        if not (path / "student").is_dir():
            raise UsageError(f"{path} has no student yet; push {path / 'pairs'}, or run `diptych distill` first")
        path = path / "student"
    if (path / MANIFEST).is_file():
        return _rows(path, licence)
    if (path / exporting.MADE).is_file():
        return _export(path, licence)
    if chain.holds_weights(path):
        return _student(path, licence)
    raise UsageError(
        f"{path}: no run, student, data set or export of diptych's (it has no recipe.yaml, weights, {MANIFEST} or "
        f"{exporting.MADE})"
    )


def _student(path: Path, licence: str) -> Material:
    edited = chain.changed(path) == [CARD]  # people write better cards than a training does
    _verified(path, but_the_card=edited)
    summary = chain.read_json(path, SUMMARY)
    if not summary or not summary.get("files"):
        raise UserError(
            f"{path}: no hashes of its files in {SUMMARY}, so nothing says what it was trained on; "
            "push the student as `diptych distill` wrote it"
        )
    files: dict[str, Path | bytes] = {name: inside(path, name) for name in summary["files"]}
    stated = _read_card(path)
    text = _licensed(stated, licence, path)
    files[SUMMARY] = inside(path, SUMMARY)
    changed = {name: text.encode() for name in (CARD,) if edited or text != stated}
    for name in summary["files"]:
        # Students of earlier versions name folders of the machine that trained them.
        if name.endswith(".json") and (clean := models.without_places(data := inside(path, name).read_bytes())) != data:
            changed[name] = clean
    if changed:
        files |= changed
        # The copy's own record names the files that it has.
        summary["files"] |= {name: sha256(data) for name, data in changed.items()}
        if changed.keys() - {CARD}:
            made = Material("model", files, text)
            names = sorted((name for name in summary["files"] if name.endswith((".safetensors", ".json"))), key=Path)
            entries = ((name, made.size(name), summary["files"][name]) for name in names)
            summary["fingerprint"] = models.fingerprint_of(entries)
        summary["sha256"] = text_hash({key: value for key, value in summary.items() if key != "sha256"})
        files[SUMMARY] = (json.dumps(summary, indent=2) + "\n").encode()
    return Material("model", files, text)


def _rows(path: Path, licence: str) -> Material:
    manifest = chain.read_json(path, MANIFEST)
    try:
        names = [part_name(part["name"]) for part in (manifest or {})["parts"]]
    except (KeyError, TypeError, UserError) as error:
        why = f" ({error})" if isinstance(error, UserError) else ""
        raise UserError(f"{path / MANIFEST} is damaged{why}; run again what made {path}") from None
    _verified(path)
    text = _read_card(path) if (path / CARD).is_file() else card.of_rows(Dataset(path))
    text = _licensed(text, licence, path)
    files: dict[str, Path | bytes] = {name: inside(path, name) for name in (*names, MANIFEST)}
    return Material("dataset", {**files, CARD: text.encode()}, text)


def _export(path: Path, licence: str) -> Material:
    exporting.check(path)
    text = _licensed(_read_card(path), licence, path)
    names = {p.relative_to(path): p for p in files_inside(path) if not p.is_symlink()}
    files: dict[str, Path | bytes] = {
        name.as_posix(): p for name, p in names.items() if not any(part.startswith(".") for part in name.parts)
    }
    return Material("dataset", {**files, CARD: text.encode()}, text)


def _verified(path: Path, but_the_card: bool = False) -> None:
    """UserError with the first link of the chain that is not what it was."""
    found = list(trace.links(trace.trace(path)["chain"]))
    for link in found[1 if but_the_card else 0 :]:
        if link["status"] == "differs":
            named = f"{link['what']} {link['where']}: {link['says']}"
            raise UserError(f"{path} is not published: {named}; `diptych trace` shows the chain")


# Card and licence ----------------------------------------------------------------------------------------------------


def _read_card(path: Path) -> str:
    try:
        return read_text(inside(path, CARD))
    except UsageError:
        raise
    except UserError:
        raise UserError(f"{path}: its {CARD}, the card, cannot be read; run again what made the folder") from None


def _licensed(text: str, licence: str, path: Path) -> str:
    """The card with a licence: its own, else the one given. UserError if there is none or there would be two."""
    import yaml

    head, front, body = ["", "", ""]
    try:
        head, front, body = text.split("---\n", 2)
        fields = parse_yaml(front, str(path / CARD))
    except ValueError:
        fields = None
    if head or not isinstance(fields, dict):
        raise UserError(f"{path / CARD} does not begin with the hub's front matter (--- … ---); run again what made it")
    known = fields.get("license") if fields.get("license") != "other" else fields.get("license_name")
    if known:
        if licence and licence != known:
            raise UserError(f"{path} is under {known}, which it has from what it was made of; leave --licence out")
        return text
    if not licence:
        raise UserError(
            f"{path} states no licence, nor does what it was made of: look it up, then name it with --licence "
            "(apache-2.0, cc-by-4.0, …)"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence) or licence in ("other", "unknown"):
        raise UsageError(f"--licence {licence}: name a licence as the hub does: apache-2.0, mit, cc-by-4.0, …")
    fields = {key: value for key, value in fields.items() if not key.startswith("license")}
    front = yaml.safe_dump({"license": licence, **fields}, sort_keys=False, allow_unicode=True)
    before, found, _ = body.partition(_LEGAL)
    said = f"{before}{found}{licence}, as whoever published it says.\n" if found else body
    return f"---\n{front}---\n{said}"
