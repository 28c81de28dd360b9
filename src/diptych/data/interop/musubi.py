"""musubi-tuner: `metadata.jsonl` with `image_path`, `control_path` and `caption`, and a `dataset.toml` that names it.

musubi-tuner opens the paths as they are, so they are absolute. Columns that it does not have are under the key
`diptych`, which its scripts ignore. Source: its docs/dataset_config.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.data.interop.folders import ListedReader, folder_of, listed_objects, local_name, read_image, write_sides
from diptych.data.interop.rows import Format, NamedRows, Options, columns_of, text_of
from diptych.data.pairs import named
from diptych.errors import UserError
from diptych.utils.io import write_atomic

LIST = "metadata.jsonl"
CONFIG = "dataset.toml"
_PATHS = {"image": "image_path", "conditioning": "control_path"}
_FIRST = ("control_path_0", "control_path_0000")  # other names that musubi-tuner accepts for the first reference


def read(place: str, options: Options) -> ListedReader:
    """A reader of a JSON lines file, or of a folder's metadata.jsonl."""
    root = folder_of(place)
    path = Path(place).expanduser()

    def load(item: dict[str, Any]) -> dict[str, Any]:
        references = [value for key, value in item.items() if key.startswith("control_path")]
        if len(references) != 1:
            raise UserError("row_invalid", f"{len(references)} reference images; a pair has one")
        extra = item.get("diptych")
        ours = {"diptych", *_PATHS.values(), *_FIRST}
        rest = {key: value for key, value in item.items() if key not in ours}
        values = named(rest, {options.text: "caption"}) | (extra if isinstance(extra, dict) else {})
        sides = {"image": item.get("image_path"), "conditioning": references[0]}
        return values | {side: read_image(root, local_name(root, name)) for side, name in sides.items()}

    return listed_objects(root, path.name if path.is_file() else LIST, load)


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the images of a shard. Returns the lines of the list."""
    lines = []
    for name, row in rows:
        files = write_sides(folder, name, row)
        paths = {theirs: str((folder / files[side]).resolve()) for side, theirs in _PATHS.items()}
        lines.append({**paths, "caption": text_of(row, options.text), "diptych": columns_of(row)})
    return lines


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """Writes metadata.jsonl, and dataset.toml with the size of the first target as the resolution."""
    lines = list(records)
    write_atomic(folder / LIST, b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
    root = folder.resolve()
    size: list[int] = []
    if lines:
        with Image.open(lines[0]["image_path"]) as image:
            size = list(image.size)
    settings = {
        "image_jsonl_file": str(root / LIST),
        "cache_directory": f"{root}-cache",  # outside, so that the export keeps only its own files
        **({"resolution": size} if size else {}),
        "enable_bucket": True,
        "batch_size": 1,
    }
    # JSON's texts, numbers, lists and true are also TOML's.
    config = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
    write_atomic(folder / CONFIG, f"[[datasets]]\n{config}".encode())


_LOADS = "--dataset_config {folder}/dataset.toml"
FORMAT = Format("musubi", "musubi-tuner's metadata.jsonl with control_path", read, write, True, _LOADS, finish)
