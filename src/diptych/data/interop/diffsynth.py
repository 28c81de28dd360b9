"""DiffSynth-Studio: `metadata.csv` with the columns `image`, `prompt`, `edit_image` and `kontext_images`.

Its scripts read the reference from `edit_image` (Qwen-Image-Edit, FLUX.2) or `kontext_images` (FLUX.1 Kontext), so both
columns name the same file. Paths are relative to `--dataset_base_path`. Source: its examples/*/model_training.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from diptych.data.interop.folders import ListedReader, folder_of, read_image, write_sides
from diptych.data.interop.rows import Format, NamedRows, Options, text_of
from diptych.data.pairs import find_columns, named
from diptych.errors import UserError
from diptych.utils.documents import read_text
from diptych.utils.io import write_atomic
from diptych.utils.paths import inside

LIST = "metadata.csv"
REFERENCES = ("edit_image", "kontext_images")


def read(place: str, options: Options) -> ListedReader:
    """A reader of a CSV file, or of a folder's metadata.csv."""
    root = folder_of(place)
    path = Path(place).expanduser()
    name = path.name if path.is_file() else LIST
    if not (root / name).is_file():
        raise UserError("path_not_found", f"{root} has no {LIST}")
    rows = csv.DictReader(io.StringIO(read_text(inside(root, name)), newline=""))
    try:
        listed = [(f"{name}:{rows.line_num}", values) for values in rows]
    except csv.Error as error:
        raise UserError("row_invalid", f"{root / name}, line {rows.line_num}: not CSV ({error})") from error
    existing = [column for column in rows.fieldnames or [] if column]
    usual = {"conditioning": next((column for column in REFERENCES if column in existing), "")}
    if "prompt" in existing:
        usual[options.text] = "prompt"
    names = find_columns(existing, {k: v for k, v in usual.items() if v} | dict(options.columns), str(root / name))

    def load(values: dict[str, Any]) -> dict[str, Any]:
        sides = {side: values.get(names[side]) for side in ("conditioning", "image")}
        images = {side: read_image(root, file) for side, file in sides.items()}
        rest = {key: value for key, value in values.items() if key and key not in REFERENCES}
        id = str(PurePosixPath(str(sides["image"])).with_suffix("")).removeprefix("image/")
        return named(rest | {names[side]: data for side, data in images.items()}, names) | {"id": id}

    return ListedReader(root, listed, load)


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the images of a shard. Returns the rows of the list."""
    lines = []
    for name, row in rows:
        files = write_sides(folder, name, row)
        references = dict.fromkeys(REFERENCES, files["conditioning"])
        lines.append({"image": files["image"], "prompt": text_of(row, options.text), **references})
    return lines


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """Writes metadata.csv."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["image", "prompt", *REFERENCES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomic(folder / LIST, text.getvalue().encode())


_LOADS = (
    "--dataset_base_path {folder} --dataset_metadata_path {folder}/metadata.csv "
    "--data_file_keys image,edit_image --extra_inputs edit_image"
)
FORMAT = Format(
    "diffsynth", "DiffSynth-Studio's metadata.csv: image, prompt, edit_image", read, write, False, _LOADS, finish
)
