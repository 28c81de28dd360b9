"""UNO: a JSON list of `{"prompt", "image_paths": [reference], "image_tgt_path"}`, paths relative to the file.

Columns that UNO does not have are under the key `diptych`, which its loader ignores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import ListedReader, folder_of, read_image, read_json, write_sides
from diptych.data.interop.rows import Format, NamedRows, Options, columns_of, text_of
from diptych.data.pairs import named
from diptych.errors import UserError
from diptych.utils.io import write_atomic

LIST = "data.json"


def read(place: str, options: Options) -> ListedReader:
    """A reader of a JSON file, or of the only one in a folder."""
    root = folder_of(place)
    path = Path(place).expanduser()
    if path.is_dir():
        files = [root / LIST] if (root / LIST).is_file() else sorted(root.glob("*.json"))
        if len(files) != 1:
            raise UserError("path_not_found", f"{root} has {len(files)} JSON files; pass the path of one")
        path = files[0]
    items = read_json(path)
    if not isinstance(items, list):
        raise UserError("json_invalid", f"{path}: not a list of pairs")

    def load(item: Any) -> dict[str, Any]:
        if not isinstance(item, dict):
            raise UserError("json_invalid", f"a JSON {type(item).__name__}, not an object")
        references = [item["image_path"]] if "image_path" in item else item.get("image_paths")
        if not isinstance(references, list) or len(references) != 1:
            count = len(references) if isinstance(references, list) else "no"
            raise UserError("row_invalid", f"{count} reference images; a pair has one")
        extra = item.get("diptych")
        rest = {k: v for k, v in item.items() if k not in ("image_path", "image_paths", "image_tgt_path", "diptych")}
        values = named(rest, {options.text: "prompt"}) | (extra if isinstance(extra, dict) else {})
        sides = {"conditioning": references[0], "image": item.get("image_tgt_path")}
        return values | {side: read_image(root, name) for side, name in sides.items()}

    return ListedReader(root, [(f"{path.name}, item {n}", item) for n, item in enumerate(items)], load)


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the images of a shard. Returns the items of the list."""
    items = []
    for name, row in rows:
        files = write_sides(folder, name, row)
        items.append(
            {
                "prompt": text_of(row, options.text),
                "image_paths": [files["conditioning"]],
                "image_tgt_path": files["image"],
                "diptych": columns_of(row),
            }
        )
    return items


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """Writes data.json, one item per line."""
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in records)
    write_atomic(folder / LIST, f"[\n{lines}\n]\n".encode())


_LOADS = "--train_data_json {folder}/data.json"
FORMAT = Format("uno", "data.json: prompt, image_paths, image_tgt_path", read, write, True, _LOADS, finish)
