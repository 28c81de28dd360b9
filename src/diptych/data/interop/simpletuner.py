"""SimpleTuner: `multidatabackend.json`, which names a folder of targets with caption files and one of references.

The backend of the targets names the other one as its `conditioning_data`; files belong together by their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import Rows, folder_of, put, read_json, twins, write_twins
from diptych.data.interop.rows import Format, Options, told
from diptych.errors import UserError

CONFIG = "multidatabackend.json"
_FOLDERS = ("conditioning", "image")


def read(place: str, options: Options) -> Rows:
    """A reader of a config, or of the folder that multidatabackend.json lies in."""
    root = folder_of(place)
    config = Path(place).expanduser()
    config = config if config.is_file() else root / CONFIG
    if not config.is_file():
        raise UserError(f"{root} holds no {CONFIG}")
    backends = read_json(config)
    if not isinstance(backends, list) or not all(isinstance(each, dict) for each in backends):
        raise UserError(f"{config} is not a list of backends")
    paired = [each for each in backends if each.get("conditioning_data")]
    if len(paired) != 1:
        raise UserError(f"{config}: {len(paired)} backends name conditioning_data; exactly one is read")
    wanted = paired[0]["conditioning_data"]
    wanted = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
    other = next((each for each in backends if each.get("id") == wanted), None)
    if other is None:
        raise UserError(f"{config}: conditioning_data names {json.dumps(wanted)}, which no backend is called")
    if (strategy := paired[0].get("caption_strategy", "textfile")) != "textfile":
        raise UserError(f"{config}: captions are read from text files only, not by caption_strategy {strategy}")
    return twins(root, _folder(root, other, config), _folder(root, paired[0], config), options)


def _folder(root: Path, backend: dict[str, Any], config: Path) -> Path:
    """A backend's folder, which must lie beside its config: by its path from there, or by its last name."""
    name = backend.get("instance_data_dir")
    if not isinstance(name, str) or not name:
        raise UserError(f"{config}: backend {json.dumps(backend.get('id'))} has no instance_data_dir")
    for path in ((root / name).resolve(), root.resolve() / Path(name).name):
        if path.is_dir() and path.is_relative_to(root.resolve()):
            return path
    raise UserError(f"{config}: there is no folder {Path(name).name} beside it; move {name} there")


def write(
    folder: Path, shard: int, of: int, rows: Sequence[tuple[str, dict[str, Any]]], options: Options
) -> list[dict[str, Any]]:
    """The files of a shard."""
    write_twins(folder / _FOLDERS[0], folder / _FOLDERS[1], rows, lambda row: told(row, options.text))
    return []


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """The config, with absolute paths, as SimpleTuner asks for."""
    reference, target = (str((folder / name).resolve()) for name in _FOLDERS)
    backends = [
        {
            "id": "targets",
            "type": "local",
            "dataset_type": "image",
            "instance_data_dir": target,
            "conditioning_data": "references",
            "caption_strategy": "textfile",
        },
        {
            "id": "references",
            "type": "local",
            "dataset_type": "conditioning",
            "conditioning_type": "reference_loose",
            "instance_data_dir": reference,
            "caption_strategy": "textfile",
        },
    ]
    put(folder / CONFIG, (json.dumps(backends, indent=2) + "\n").encode())


_LOADS = "--data_backend_config={folder}/multidatabackend.json (and in it your resolution and cache folders)"
FORMAT = Format("simpletuner", "multidatabackend.json and two folders", read, write, finish, False, _LOADS)
