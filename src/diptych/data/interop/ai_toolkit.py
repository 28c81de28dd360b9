"""Folder pairs of ai-toolkit: `control/NAME.png`, `target/NAME.png` and `target/NAME.txt`.

In ai-toolkit's config the folders are `control_path` and `folder_path`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.data.interop.folders import ListedReader, folder_of, twins, write_twins
from diptych.data.interop.rows import Format, NamedRows, Options
from diptych.data.pairs import SIDES
from diptych.errors import UsageError
from diptych.utils.paths import inside

# Common names of the two folders.
FOLDERS = {
    "conditioning": ("control", "controls", "conditioning", "reference", "references", "source", "input"),
    "image": ("target", "targets", "image", "images", "edited", "output"),
}


def read(place: str, options: Options) -> ListedReader:
    """A reader of the folder that contains both."""
    root = folder_of(place)
    folders: dict[str, Path] = {}
    for side, names in FOLDERS.items():
        candidates = (options.columns[side],) if side in options.columns else names
        name = next((name for name in candidates if (root / name).is_dir()), None)
        if name is None:
            raise UsageError(
                "path_not_found",
                f"{root}: no folder for the {SIDES[side]} images; pass --column {side}=FOLDER, or use one of these "
                f"names: {', '.join(names)}",
            )
        folders[side] = inside(root, name)
    return twins(root, folders["conditioning"], folders["image"], options)


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the files of a shard."""
    write_twins(folder / "control", folder / "target", rows, options)
    return []


_LOADS = "datasets: [{{folder_path: {folder}/target, control_path: {folder}/control, caption_ext: txt}}]"
FORMAT = Format("ai-toolkit", "folders control/ and target/ with caption files", read, write, False, _LOADS)
