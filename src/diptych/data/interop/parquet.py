"""Parquet files of the hub: `conditioning`, `image`, `caption` (the released data set), or the names of edit data.

They are read in place over fsspec, one row group at a time. `Options.columns` maps other column names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.data.interop.rows import Entry, Format, NamedRows, Options, text_of
from diptych.data.pairs import named
from diptych.data.records import IMAGE, PAIR, schema
from diptych.data.sources import Parquet
from diptych.data.store import encode
from diptych.utils.io import write_atomic

EDIT = {"original_image": IMAGE, "edit_prompt": "string", "edited_image": IMAGE}
_EDIT_SIDES = {"original_image": "conditioning", "edited_image": "image"}


class ParquetReader:
    """A reader of parquet files: `sources.Parquet`, with every column."""

    def __init__(self, place: str, options: Options) -> None:
        self.data = Parquet(place.rstrip("/"), options.columns or None, options.split)

    def __len__(self) -> int:
        return len(self.data)

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def entries(self, start: int) -> Iterator[Entry]:
        names, before = self.data.columns, 0
        for shard in self.data.shards():
            rows = self.data.rows_in(shard)
            if before + rows > start:
                for n, values in enumerate(self.data.read_raw(shard, self.data.there)):
                    if before + n >= start:
                        where = f"row {n} of shard {shard}"
                        yield Entry(where, lambda values=values: named(values, names))
            before += rows


def write(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the file of a shard, named as on the hub."""
    data = encode([{key: row[key] for key in PAIR} for _, row in rows], schema(PAIR))
    write_atomic(folder / f"train-{shard:05d}-of-{of:05d}.parquet", data)
    return []


def write_edit(folder: Path, shard: int, of: int, rows: NamedRows, options: Options) -> list[dict[str, Any]]:
    """Writes the file of a shard with `original_image`, `edit_prompt`, `edited_image`, then the other columns."""
    rest = {key: kind for key, kind in PAIR.items() if kind != IMAGE}
    renamed = [
        {
            **{theirs: row[ours] for theirs, ours in _EDIT_SIDES.items()},
            "edit_prompt": text_of(row, "instruction"),
            **{key: row[key] for key in rest},
        }
        for _, row in rows
    ]
    write_atomic(folder / f"train-{shard:05d}-of-{of:05d}.parquet", encode(renamed, schema({**EDIT, **rest})))
    return []


_LOADS = 'load_dataset("parquet", data_files="{folder}/*.parquet", split="train")'
FORMAT = Format("parquet", "hub parquet: conditioning, image, caption", ParquetReader, write, True, _LOADS)
EDITS = Format(
    "edit-parquet", "hub parquet: original_image, edit_prompt, edited_image", ParquetReader, write_edit, True, _LOADS
)
