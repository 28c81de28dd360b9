"""Files in folders: what the formats that keep each picture in a file of its own share.

A path in a row is data. It may name a file inside the data set's own folder and nothing else on the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.data.formats import pictures_in
from diptych.data.images import MAX_BYTES
from diptych.data.interop.rows import Entry, Options, extension
from diptych.data.pairs import SIDES
from diptych.errors import UsageError, UserError
from diptych.utils import paths
from diptych.utils.documents import decode, parse_json, read_text
from diptych.utils.io import write_atomic

MAX_TEXT = 2**20  # bytes of a caption file


class Rows:
    """A reader of rows that are listed already."""

    def __init__(self, root: Path, listed: Sequence[tuple[str, Any]], load: Callable[[Any], dict[str, Any]]) -> None:
        """`listed` is (where, what `load` makes a row of)."""
        self.root, self.listed, self.load = root, listed, load

    def __len__(self) -> int:
        return len(self.listed)

    def fingerprint(self) -> str:
        return digest_of_files(self.root)

    def entries(self, start: int) -> Iterator[Entry]:
        for where, what in self.listed[start:]:
            yield Entry(where, lambda what=what: self.load(what))


def folder_of(place: str) -> Path:
    """The folder that a path names, or that a named file lies in; UserError if it is not there."""
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(f"{place}: there is no such file or folder")
    return path if path.is_dir() else path.parent


def digest_of_files(root: Path) -> str:
    """sha256 over the names and sizes of all files in a folder; hidden ones are not part of it."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def inside(root: Path, name: Any) -> Path:
    """The file that a row names, relative to the data set's folder. UserError if it is outside of it or not there."""
    if not isinstance(name, str) or not name:
        raise UserError(f"a file name is expected, not {json.dumps(name, default=str)[:60]}")
    path = paths.inside(root, name)
    if not path.is_file():
        raise UserError(f"{name} is missing")
    return path


def picture(root: Path, name: Any) -> bytes:
    """The bytes of a picture that a row names."""
    path = inside(root, name)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{name}: {path.stat().st_size / 2**20:.0f} MiB is over the limit of {MAX_BYTES // 2**20} MiB")
    return path.read_bytes()


def text(root: Path, name: str) -> str:
    """A caption file, without the white space around it."""
    path = inside(root, name)
    if path.stat().st_size > MAX_TEXT:
        raise UserError(f"{name} is larger than a caption can be")
    return row_text(path.read_bytes(), name)


def row_text(data: bytes, name: str) -> str:
    """The text of one row's file, without the white space around it. UserError, of this row alone, if not UTF-8."""
    try:
        return decode(data, name).strip()
    except UsageError as error:
        raise UserError(str(error)) from None


def pictures(folder: Path) -> dict[str, str]:
    """name without its ending → file name, of the pictures right in a folder. UserError where two share a name."""
    found: dict[str, str] = {}
    for path in pictures_in(folder, beside=(".txt",)):
        if path.stem in found:
            raise UserError(f"{folder} has both {found[path.stem]} and {path.name}; which is the picture?")
        found[path.stem] = path.name
    return found


def twins(root: Path, reference: Path, target: Path, options: Options) -> Rows:
    """Pairs by equal file names: the reference in one folder, target and caption file in the other."""
    references, targets = pictures(reference), pictures(target)

    def load(name: str) -> dict[str, Any]:
        if name not in targets:
            raise UserError(f"{target.name}/ has no picture of this name")
        if name not in references:
            raise UserError(f"{reference.name}/ has no picture of this name")
        return {
            "conditioning": picture(reference, references[name]),
            "image": picture(target, targets[name]),
            options.text: text(target, f"{name}.txt"),
            "id": name,
        }

    names = sorted(references.keys() | targets.keys())
    return Rows(root, [(name, name) for name in names], load)


def write_twins(
    reference: Path, target: Path, rows: Iterable[tuple[str, Mapping[str, Any]]], text_of: Callable[[Any], str]
) -> None:
    """The files that `twins` reads."""
    for name, row in rows:
        for folder, side in ((reference, "conditioning"), (target, "image")):
            put_small(folder / f"{name}{extension(row[side]['bytes'])}", row[side]["bytes"])
        put_small(target / f"{name}.txt", text_of(row).encode() + b"\n")


def write_sides(folder: Path, name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Both pictures of a row under `folder`/conditioning and image; column → path relative to `folder`."""
    names = {side: f"{side}/{name}{extension(row[side]['bytes'])}" for side in SIDES}
    for side, path in names.items():
        put_small(folder / path, row[side]["bytes"])
    return names


def put(path: Path, data: bytes) -> None:
    """Writes a file whole, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def put_small(path: Path, data: bytes) -> None:
    """One of thousands of files: not flushed to the disk one by one, which would take longer than all else.

    A shard counts as written once its note is; what a power cut then still loses, reading back finds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        paths.refuse_link(path).write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """A JSON file; UserError if it is none."""
    try:
        return parse_json(read_text(paths.inside(path.parent, path.name)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({str(error)[:120]})") from error
