"""A folder of images with `metadata.jsonl`, as `datasets` reads it: the columns `NAME_file_name` name images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import ListedReader, folder_of, parse_object, read_image, write_sides
from diptych.data.interop.rows import Format, NamedRows, Options, columns_of
from diptych.data.pairs import find_columns, named
from diptych.errors import UserError
from diptych.utils.documents import read_lines
from diptych.utils.io import write_atomic
from diptych.utils.paths import inside

LIST = "metadata.jsonl"
_SUFFIX = "_file_name"


def read(place: str, options: Options) -> ListedReader:
    """A reader of the folder, or of the folder of a metadata.jsonl."""
    root = folder_of(place)
    path = root / LIST
    if not path.is_file():
        splits = sorted(each.parent.name for each in root.glob(f"*/{LIST}"))
        choice = f"; pass the folder of one split: {', '.join(splits)}" if splits else ""
        raise UserError("path_not_found", f"{root} has no {LIST}{choice}")
    listed = [(n, line) for n, line in enumerate(read_lines(inside(root, LIST)), 1) if line.strip()]
    first = _columns(listed[0][1]) if listed else {}
    names = find_columns(list(first), options.columns, str(path))

    def load(line: str) -> dict[str, Any]:
        values = _columns(line)
        for side in ("conditioning", "image"):
            values[names[side]] = read_image(root, values.get(names[side]))
        return named(values, names)

    return ListedReader(root, [(f"{LIST}:{number}", line) for number, line in listed], load)


def _columns(line: str) -> dict[str, Any]:
    """The object of a line. `X_file_name` is the column X, and `file_name` is `image`."""
    values = parse_object(line)
    return {"image" if key == "file_name" else key.removesuffix(_SUFFIX): value for key, value in values.items()}


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the images of a shard. Returns the lines of the list."""
    lines = []
    for name, row in rows:
        files = write_sides(folder, name, row)
        lines.append({**{f"{side}{_SUFFIX}": path for side, path in files.items()}, **columns_of(row)})
    return lines


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """Writes metadata.jsonl, which makes the folder a data set."""
    write_atomic(folder / LIST, b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in records))


_LOADS = 'load_dataset("imagefolder", data_dir="{folder}", split="train")'
FORMAT = Format("imagefolder", "a folder of images with metadata.jsonl", read, write, True, _LOADS, finish)
