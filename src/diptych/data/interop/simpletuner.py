"""SimpleTuner: `multidatabackend.json` with one backend of targets and caption files, and one of references.

The backend of the targets names the other one as `conditioning_data`. Files with equal names belong together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import ListedReader, folder_of, read_json, twins, write_twins
from diptych.data.interop.rows import Format, NamedRows, Options
from diptych.errors import UserError
from diptych.utils.io import write_atomic

CONFIG = "multidatabackend.json"
_FOLDERS = ("conditioning", "image")


def read(place: str, options: Options) -> ListedReader:
    """A reader of a config, or of the folder that contains multidatabackend.json."""
    root = folder_of(place)
    config = Path(place).expanduser()
    config = config if config.is_file() else root / CONFIG
    if not config.is_file():
        raise UserError("path_not_found", f"{root} has no {CONFIG}")
    backends = read_json(config)
    if not isinstance(backends, list) or not all(isinstance(each, dict) for each in backends):
        raise UserError("json_invalid", f"{config}: not a list of backends")
    paired = [each for each in backends if each.get("conditioning_data")]
    if len(paired) != 1:
        raise UserError("json_invalid", f"{config}: {len(paired)} backends have conditioning_data; there must be one")
    wanted = paired[0]["conditioning_data"]
    wanted = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
    other = next((each for each in backends if each.get("id") == wanted), None)
    if other is None:
        raise UserError("json_invalid", f"{config}: no backend has the conditioning_data's id {json.dumps(wanted)}")
    if (strategy := paired[0].get("caption_strategy", "textfile")) != "textfile":
        raise UserError("json_invalid", f"{config}: caption_strategy is {strategy}; only textfile can be read")
    return twins(root, _folder(root, other, config), _folder(root, paired[0], config), options)


def _folder(root: Path, backend: dict[str, Any], config: Path) -> Path:
    """A backend's folder beside its config, by its relative path or its last name."""
    name = backend.get("instance_data_dir")
    if not isinstance(name, str) or not name:
        raise UserError("json_invalid", f"{config}: backend {json.dumps(backend.get('id'))} has no instance_data_dir")
    for path in ((root / name).resolve(), root.resolve() / Path(name).name):
        if path.is_dir() and path.is_relative_to(root.resolve()):
            return path
    raise UserError("path_not_found", f"{config}: no folder {Path(name).name} beside it; move {name} there")


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the files of a shard."""
    write_twins(folder / _FOLDERS[0], folder / _FOLDERS[1], rows, options)
    return []


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """Writes the config, with absolute paths, which SimpleTuner requires."""
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
    write_atomic(folder / CONFIG, (json.dumps(backends, indent=2) + "\n").encode())


_LOADS = "--data_backend_config={folder}/multidatabackend.json (and in it your resolution and cache folders)"
FORMAT = Format("simpletuner", "multidatabackend.json and two folders", read, write, False, _LOADS, finish)
