"""Parquet as the hub has it: `conditioning`, `image`, `caption` (the released data set), or the names of edit data.

Read in place over fsspec, a row group at a time; columns of other names are mapped (`Options.columns`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diptych.data.interop.folders import put
from diptych.data.interop.rows import Entry, Format, Options, told
from diptych.data.pairs import named
from diptych.data.records import IMAGE, PAIR, schema
from diptych.data.sources import Parquet
from diptych.data.store import encode

EDIT = {"original_image": IMAGE, "edit_prompt": "string", "edited_image": IMAGE}
_EDIT_SIDES = {"original_image": "conditioning", "edited_image": "image"}


class Reader:
    """Parquet files: `sources.Parquet`, with every column."""

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


def write(
    folder: Path, shard: int, of: int, rows: Sequence[tuple[str, dict[str, Any]]], options: Options
) -> list[dict[str, Any]]:
    """One file of a shard, named as the hub names them."""
    data = encode([{key: row[key] for key in PAIR} for _, row in rows], schema(PAIR))
    put(folder / f"train-{shard:05d}-of-{of:05d}.parquet", data)
    return []


def write_edit(
    folder: Path, shard: int, of: int, rows: Sequence[tuple[str, dict[str, Any]]], options: Options
) -> list[dict[str, Any]]:
    """The same with `original_image`, `edit_prompt`, `edited_image` first; the other columns come after them."""
    rest = {key: kind for key, kind in PAIR.items() if kind != IMAGE}
    renamed = [
        {
            **{theirs: row[ours] for theirs, ours in _EDIT_SIDES.items()},
            "edit_prompt": told(row, "instruction"),
            **{key: row[key] for key in rest},
        }
        for _, row in rows
    ]
    put(folder / f"train-{shard:05d}-of-{of:05d}.parquet", encode(renamed, schema({**EDIT, **rest})))
    return []


def finish(folder: Path, records: Iterable[dict[str, Any]], options: Options) -> None:
    """Parquet files need no list."""


_LOADS = 'load_dataset("parquet", data_files="{folder}/*.parquet", split="train")'
FORMAT = Format("parquet", "hub parquet: conditioning, image, caption", Reader, write, finish, True, _LOADS)
EDITS = Format(
    "edit-parquet", "hub parquet: original_image, edit_prompt, edited_image", Reader, write_edit, finish, True, _LOADS
)
