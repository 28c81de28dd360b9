"""ai-toolkit's folder pairs: `control/NAME.png`, `target/NAME.png` and `target/NAME.txt` of the same name.

In ai-toolkit's config the folders are `control_path` and `folder_path`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import Rows, folder_of, twins, write_twins
from diptych.data.interop.rows import Format, Options, told
from diptych.errors import UsageError
from diptych.utils.paths import inside

# What people call the two folders.
FOLDERS = {
    "conditioning": ("control", "controls", "conditioning", "reference", "references", "source", "input"),
    "image": ("target", "targets", "image", "images", "edited", "output"),
}


def read(place: str, options: Options) -> Rows:
    """A reader of the folder that holds the two."""
    root = folder_of(place)
    found: dict[str, Path] = {}
    for side, names in FOLDERS.items():
        wanted = (options.columns[side],) if side in options.columns else names
        folder = next((root / name for name in wanted if (root / name).is_dir()), None)
        if folder is None:
            what = "reference" if side == "conditioning" else "target"
            raise UsageError(
                f"{root}: which folder holds the {what} pictures? Say it with --column {side}=FOLDER; "
                f"known are: {', '.join(names)}"
            )
        found[side] = inside(root, folder.relative_to(root).as_posix())
    return twins(root, found["conditioning"], found["image"], options)


def write(
    folder: Path, shard: int, of: int, rows: Sequence[tuple[str, dict[str, Any]]], options: Options
) -> list[dict[str, Any]]:
    """The files of a shard."""
    write_twins(folder / "control", folder / "target", rows, lambda row: told(row, options.text))
    return []


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """The folders are all there is."""


_LOADS = "datasets: [{{folder_path: {folder}/target, control_path: {folder}/control, caption_ext: txt}}]"
FORMAT = Format("ai-toolkit", "folders control/ and target/ with caption files", read, write, finish, False, _LOADS)
