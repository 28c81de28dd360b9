"""UNO's JSON: a list of `{"prompt", "image_paths": [reference], "image_tgt_path"}`, paths relative to the file.

What UNO does not know lies under the key `diptych`, which its loader passes over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import Rows, folder_of, picture, put, read_json, write_sides
from diptych.data.interop.rows import Format, Options, columns_of, told
from diptych.data.pairs import named
from diptych.errors import UserError

LIST = "data.json"


def read(place: str, options: Options) -> Rows:
    """A reader of a JSON file, or of the one in a folder."""
    root = folder_of(place)
    path = Path(place).expanduser()
    if path.is_dir():
        found = [root / LIST] if (root / LIST).is_file() else sorted(root.glob("*.json"))
        if len(found) != 1:
            raise UserError(f"{root} holds {len(found)} JSON files; name the one")
        path = found[0]
    items = read_json(path)
    if not isinstance(items, list):
        raise UserError(f"{path} is not a list of pairs")

    def load(item: Any) -> dict[str, Any]:
        if not isinstance(item, dict):
            raise UserError(f"not a JSON object but a {type(item).__name__}")
        references = [item["image_path"]] if "image_path" in item else item.get("image_paths")
        if not isinstance(references, list) or len(references) != 1:
            count = len(references) if isinstance(references, list) else "no"
            raise UserError(f"{count} reference pictures, and a pair has one")
        own = item.get("diptych")
        rest = {k: v for k, v in item.items() if k not in ("image_path", "image_paths", "image_tgt_path", "diptych")}
        values = named(rest, {options.text: "prompt"}) | (own if isinstance(own, dict) else {})
        sides = {"conditioning": references[0], "image": item.get("image_tgt_path")}
        return values | {side: picture(root, name) for side, name in sides.items()}

    return Rows(root, [(f"{path.name}, item {n}", item) for n, item in enumerate(items)], load)


def write(
    folder: Path, shard: int, of: int, rows: Sequence[tuple[str, dict[str, Any]]], options: Options
) -> list[dict[str, Any]]:
    """The pictures of a shard; gives the items of the list."""
    items = []
    for name, row in rows:
        files = write_sides(folder, name, row)
        items.append(
            {
                "prompt": told(row, options.text),
                "image_paths": [files["conditioning"]],
                "image_tgt_path": files["image"],
                "diptych": columns_of(row),
            }
        )
    return items


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """data.json, one item a line."""
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in records)
    put(folder / LIST, f"[\n{lines}\n]\n".encode())


_LOADS = "--train_data_json {folder}/data.json"
FORMAT = Format("uno", "data.json: prompt, image_paths, image_tgt_path", read, write, finish, True, _LOADS)
