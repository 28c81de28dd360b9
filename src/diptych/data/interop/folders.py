"""Image files in folders: common functions of the formats that store each image in a file.

A path in a row is data. It may only name a file inside the folder of the data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.data.formats import pictures_in
from diptych.data.images import MAX_BYTES
from diptych.data.interop.rows import Entry, NamedRows, Options, extension, text_of
from diptych.data.pairs import SIDES
from diptych.errors import UsageError, UserError
from diptych.utils import paths
from diptych.utils.documents import decode, parse_json, read_lines, read_text, size

MAX_TEXT = 2**20  # bytes of a caption file


class ListedReader:
    """A reader of rows that are already listed."""

    def __init__(self, root: Path, listed: Sequence[tuple[str, Any]], load: Callable[[Any], dict[str, Any]]) -> None:
        """`listed` has (place, argument of `load`) for each row."""
        self.root, self.listed, self.load = root, listed, load

    def __len__(self) -> int:
        return len(self.listed)

    def fingerprint(self) -> str:
        return digest_of_files(self.root)

    def entries(self, start: int) -> Iterator[Entry]:
        for where, what in self.listed[start:]:
            yield Entry(where, lambda what=what: self.load(what))


def listed_objects(root: Path, name: str, load: Callable[[dict[str, Any]], dict[str, Any]]) -> ListedReader:
    """A reader of a JSON lines file `name` in `root`, one object a row. UserError if it does not exist."""
    if not (root / name).is_file():
        raise UserError("path_not_found", f"{root} has no {name}")
    listed = [(n, line) for n, line in enumerate(read_lines(paths.inside(root, name)), 1) if line.strip()]
    return ListedReader(root, [(f"{name}:{n}", line) for n, line in listed], lambda line: load(parse_object(line)))


def parse_object(line: str) -> dict[str, Any]:
    """The object of a line of JSON. UserError if it is not an object."""
    try:
        values = parse_json(line)
    except ValueError as error:
        raise UserError("json_invalid", f"invalid JSON ({str(error)[:80]})") from error
    if not isinstance(values, dict):
        raise UserError("json_invalid", f"a JSON {type(values).__name__}, not an object")
    return values


def folder_of(place: str) -> Path:
    """The folder at a path, or of the file at a path. UserError if it does not exist."""
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError("path_not_found", f"{place}: no such file or folder")
    return path if path.is_dir() else path.parent


def digest_of_files(root: Path) -> str:
    """sha256 of the names and sizes of all files in a folder, without hidden ones."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def inside(root: Path, name: Any) -> Path:
    """The file that a row names, relative to the data set's folder. UserError if it is outside or missing."""
    if not isinstance(name, str) or not name:
        raise UserError("row_invalid", f"{json.dumps(name, default=str)[:60]} is not a file name")
    path = paths.inside(root, name)
    if not path.is_file():
        raise UserError("path_not_found", f"{name} is missing")
    return path


def read_image(root: Path, name: Any) -> bytes:
    """The bytes of an image that a row names."""
    return read_file(root, name, MAX_BYTES)


def read_file(root: Path, name: Any, limit: int) -> bytes:
    """The bytes of a file that a row names. UserError if it is larger than `limit` bytes."""
    path = inside(root, name)
    if (length := path.stat().st_size) > limit:
        raise UserError("file_too_large", f"{name}: {size(length)} is over the limit of {size(limit)}")
    return path.read_bytes()


def local_name(root: Path, name: Any) -> Any:
    """An absolute path of a row as a path in the data set's folder `root`, which may have moved since it was written:
    then the last two parts of the path. Anything else is returned as it is."""
    if not isinstance(name, str) or not Path(name).is_absolute():
        return name
    for top in (root.absolute(), root.resolve()):
        if Path(name).is_relative_to(top):
            return Path(name).relative_to(top).as_posix()
    return Path(*Path(name).parts[-2:]).as_posix()


def row_text(data: bytes, name: str) -> str:
    """The text of a row's file, without surrounding white space. UserError, for this row only, if it is not UTF-8."""
    try:
        return decode(data, name).strip()
    except UsageError as error:
        raise UserError(error.code, str(error)) from None


def image_names(folder: Path) -> dict[str, str]:
    """Stem → file name of the images directly in a folder. UserError if two have the same stem."""
    names: dict[str, str] = {}
    for path in pictures_in(folder, beside=(".txt",)):
        if path.stem in names:
            raise UserError("row_invalid", f"{folder} has both {names[path.stem]} and {path.name}; remove one of them")
        names[path.stem] = path.name
    return names


def twins(root: Path, reference: Path, target: Path, options: Options) -> ListedReader:
    """Pairs by equal names: the reference in one folder, the target and its caption file in the other."""
    references, targets = image_names(reference), image_names(target)

    def load(name: str) -> dict[str, Any]:
        for folder, files in ((target, targets), (reference, references)):
            if name not in files:
                raise UserError("image_missing", f"{folder.name}/ has no image named {name}")
        return {
            "conditioning": read_image(reference, references[name]),
            "image": read_image(target, targets[name]),
            options.text: row_text(read_file(target, f"{name}.txt", MAX_TEXT), f"{name}.txt"),
            "id": name,
        }

    names = sorted(references.keys() | targets.keys())
    return ListedReader(root, [(name, name) for name in names], load)


def write_twins(reference: Path, target: Path, rows: NamedRows, options: Options) -> None:
    """Writes the files that `twins` reads."""
    for name, row in rows:
        for folder, side in ((reference, "conditioning"), (target, "image")):
            put_small(folder / f"{name}{extension(row[side]['bytes'])}", row[side]["bytes"])
        put_small(target / f"{name}.txt", text_of(row, options.text).encode() + b"\n")


def write_sides(folder: Path, name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Writes both images of a row under `folder`; returns column → path relative to it."""
    names = {side: f"{side}/{name}{extension(row[side]['bytes'])}" for side in SIDES}
    for side, path in names.items():
        put_small(folder / path, row[side]["bytes"])
    return names


def put_small(path: Path, data: bytes) -> None:
    """Writes one of thousands of files, without a flush to the disk, which would take longer than all other work.

    A shard counts as written once its note is. If a power cut loses data after that, reading back detects it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        paths.refuse_link(path).write_bytes(data)
    except OSError as error:
        raise UserError("path_unwritable", f"cannot write {path}: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file. UserError if it is invalid."""
    try:
        return parse_json(read_text(paths.inside(path.parent, path.name)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError("json_invalid", f"{path}: invalid JSON ({str(error)[:120]})") from error
