"""OneTrainer: `images/NAME.png`, `images/NAME.txt` and the reference as `images/NAME-condlabel.png`; `concepts.json`.

OneTrainer looks for a reference under the suffix .png only and opens it by its content. So a JPEG or WebP reference
keeps its bytes under that name. Source: modules/dataLoader/mixin/DataLoaderText2ImageMixin.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import (
    MAX_TEXT,
    ListedReader,
    folder_of,
    image_names,
    put_small,
    read_file,
    read_image,
    read_json,
    row_text,
)
from diptych.data.interop.rows import Format, NamedRows, Options, extension, text_of
from diptych.errors import UserError
from diptych.utils.io import write_atomic

CONFIG = "concepts.json"
IMAGES = "images"
REFERENCE = "-condlabel"


def read(place: str, options: Options) -> ListedReader:
    """A reader of a concepts.json, of its folder, or of a folder of images."""
    root = folder_of(place)
    path = Path(place).expanduser()
    config = path if path.is_file() else root / CONFIG
    folder = _folder(root, config) if config.is_file() else root
    files = image_names(folder)
    names = sorted(name for name in files if not name.endswith(REFERENCE))
    if len(names) == len(files):
        raise UserError("path_not_found", f"{folder} has no file whose name ends in {REFERENCE}.png")

    def load(name: str) -> dict[str, Any]:
        if name + REFERENCE not in files:
            raise UserError("image_missing", f"{folder.name}/ has no {name}{REFERENCE}.png")
        return {
            "conditioning": read_image(folder, files[name + REFERENCE]),
            "image": read_image(folder, files[name]),
            options.text: row_text(read_file(folder, f"{name}.txt", MAX_TEXT), f"{name}.txt"),
            "id": name,
        }

    return ListedReader(folder, [(name, name) for name in names], load)


def _folder(root: Path, config: Path) -> Path:
    """The folder of the only concept, beside its file."""
    concepts = read_json(config)
    if not isinstance(concepts, list) or len(concepts) != 1 or not isinstance(concepts[0], dict):
        raise UserError("json_invalid", f"{config}: not a list of one concept")
    name = Path(str(concepts[0].get("path"))).name
    if not (root / name).is_dir():
        raise UserError("path_not_found", f"{config}: no folder {name} beside it")
    return root / name


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the files of a shard."""
    for name, row in rows:
        place = folder / IMAGES
        put_small(place / f"{name}{extension(row['image']['bytes'])}", row["image"]["bytes"])
        put_small(place / f"{name}{REFERENCE}.png", row["conditioning"]["bytes"])
        put_small(place / f"{name}.txt", text_of(row, options.text).encode() + b"\n")
    return []


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """Writes concepts.json, with an absolute path. OneTrainer has a default for every other key."""
    concepts = [{"__version": 1, "name": folder.resolve().name, "path": str((folder / IMAGES).resolve())}]
    write_atomic(folder / CONFIG, (json.dumps(concepts, indent=2) + "\n").encode())


_LOADS = '"concept_file_name": "{folder}/concepts.json", "custom_conditioning_image": true in the config'
FORMAT = Format("onetrainer", "OneTrainer's images/NAME.png and NAME-condlabel.png", read, write, False, _LOADS, finish)
