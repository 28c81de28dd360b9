"""Pairs to train on that other people made: any parquet with a reference, a target and a text, read where it lies.

    data = open_pairs("hf://datasets/primecai/dsd_data")        # a hub data set, a row group at a time
    data = open_pairs("edits/", {"image": "after"})             # a folder of parquet files, one column named
    data = open_pairs("runs/other")                             # another run's pairs

What comes out has the interface of a run's own pairs as training reads them: shards of rows of `records.PAIR`'s first
columns. Nothing is copied; an fsspec address is streamed. Pictures must lie in the rows: a path in one is not opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diptych.data.store import MANIFEST, Dataset, reading
from diptych.errors import UsageError, UserError, nearest

if TYPE_CHECKING:
    import pyarrow.parquet as pq

SHARD = 128  # rows, at most; a large row group is read once and cut
# What hub data sets call their columns (the released data set's names first).
NAMES = {
    "conditioning": ("conditioning", "original_image", "input_image", "source_image", "reference"),
    "image": ("image", "edited_image", "target_image", "output_image", "target"),
    "caption": ("caption", "prompt", "text"),
    "instruction": ("instruction", "edit_prompt", "edit_instruction"),
}


class Pairs(Protocol):
    """What training reads of a data set of pairs."""

    url: str

    def shards(self) -> list[int]: ...

    def rows_in(self, shard: int) -> int: ...

    def read_shard(self, shard: int) -> list[dict[str, Any]]: ...

    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


def open_pairs(path: str, columns: Mapping[str, str] | None = None) -> Pairs:
    """The pairs at a path or an fsspec address: a run, a data set that diptych published, or anyone's parquet.

    `columns` maps ours ("conditioning", "image", "caption", "instruction") to theirs; what it leaves out is looked for
    under the usual names. UserError if there is nothing to read or it is unfinished, UsageError for a column that is
    not there.
    """
    url = path.rstrip("/")
    local = Path(url).expanduser()
    if "://" not in url:
        if not local.exists():
            known = "a run's folder, a folder of parquet files, or an fsspec address such as hf://datasets/OWNER/NAME"
            raise UserError(f"{path}: there is no such data; give {known}")
        if (local / "pairs" / MANIFEST).is_file():
            local = local / "pairs"
        if (local / MANIFEST).is_file() and not columns:
            data = Dataset(local)
            if not data.is_complete():
                raise UserError(f"{local} is not complete; run the stage that makes it first")
            return data
        url = str(local)
    return Parquet(url, columns)


class Parquet:
    """A folder (or one file) of parquet that somebody else made."""

    def __init__(self, url: str, columns: Mapping[str, str] | None = None) -> None:
        self.url = url
        self._system, root = _filesystem(url)
        self.files = sorted(self._system.glob(f"{root}/**/*.parquet")) if self._system.isdir(root) else [root]
        if not self.files or not self._system.exists(self.files[0]):
            raise UserError(f"{url} holds no parquet files")
        self._places: list[tuple[int, int, int, int]] = []  # file, row group, first row in it, rows
        self._digest = hashlib.sha256(repr(sorted((columns or {}).items())).encode())
        self.columns: dict[str, str] = {}  # ours → theirs
        self.there: list[str] = []  # every column of the files, by their names
        self._group: tuple[tuple[int, int, tuple[str, ...]], list[dict[str, Any]]] | None = None
        for number, name in enumerate(self.files):
            with self._open(number) as file:
                if not self.columns:
                    self.there = list(file.schema_arrow.names)
                    self.columns = find_columns(self.there, columns or {}, url)
                if missing := [theirs for theirs in self.columns.values() if theirs not in file.schema_arrow.names]:
                    raise UsageError(f"{name} has no column '{missing[0]}', which the files before it have")
                groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
            described = [(g.num_rows, g.total_byte_size, g.column(0).data_page_offset) for g in groups]
            self._digest.update(f"{name[len(root) :]} {self._system.size(name)} {described}".encode())
            for group, rows in enumerate(g.num_rows for g in groups):
                self._places += [(number, group, first, min(SHARD, rows - first)) for first in range(0, rows, SHARD)]

    def shards(self) -> list[int]:
        return list(range(len(self._places)))

    def rows_in(self, shard: int) -> int:
        return self._places[shard][3]

    def __len__(self) -> int:
        return sum(rows for *_, rows in self._places)

    def fingerprint(self) -> str:
        """sha256 over the files' names, sizes and row groups, and the columns asked for; no picture is read for it."""
        return self._digest.hexdigest()

    def read_shard(self, shard: int) -> list[dict[str, Any]]:
        """Rows with `conditioning`, `image`, `caption`, `instruction`, `id` and `grid_id`."""
        number, group, first, _ = self._places[shard]
        rows = self.read_raw(shard, list(dict.fromkeys(self.columns.values())))
        return [self._row(row, f"{number:05d}-{group}-{first + n}") for n, row in enumerate(rows)]

    def read_raw(self, shard: int, names: list[str]) -> list[dict[str, Any]]:
        """Rows as they lie there, of these columns; one that a file lacks is left out."""
        number, group, first, count = self._places[shard]
        key = (number, group, tuple(names))
        if self._group is None or self._group[0] != key:
            with reading(self.files[number]), self._open(number) as file:
                there = set(file.schema_arrow.names)
                table = file.read_row_group(group, columns=[name for name in names if name in there])
            self._group = (key, table.to_pylist())
        return self._group[1][first : first + count]

    def _row(self, row: Mapping[str, Any], name: str) -> dict[str, Any]:
        mapped: dict[str, Any] = {ours: row[theirs] for ours, theirs in self.columns.items()}
        for side in ("conditioning", "image"):
            mapped[side] = _cell(mapped[side], f"{name} {side}")
        instruction = str(mapped.get("instruction") or "")
        caption = str(mapped.get("caption") or "") or instruction
        # Pairs of one reference are held out of training together.
        reference = hashlib.sha256(mapped["conditioning"]["bytes"]).hexdigest()[:16]
        return {**mapped, "caption": caption, "instruction": instruction, "id": name, "grid_id": reference}

    def _open(self, number: int) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        with reading(self.files[number]):
            return pq.ParquetFile(self._system.open(self.files[number]), pre_buffer=False)


def find_columns(there: list[str], asked: Mapping[str, str], where: str) -> dict[str, str]:
    """Ours → theirs. UsageError for an asked one that is not there, or a needed one that nothing there is called."""
    for theirs in asked.values():
        if theirs not in there:
            raise UsageError(f"{where} has no column '{theirs}'{nearest(theirs, there)}; it has: {', '.join(there)}")
    found = {ours: next((name for name in names if name in there), "") for ours, names in NAMES.items()}
    found = {ours: theirs for ours, theirs in (found | dict(asked)).items() if theirs}
    for ours in ("conditioning", "image"):
        if ours not in found:
            raise UsageError(
                f"{where}: which column is the {'reference' if ours == 'conditioning' else 'target'} picture? "
                f"Say it with columns: {{{ours}: NAME}}; it has: {', '.join(there)}"
            )
    if "caption" not in found and "instruction" not in found:
        raise UsageError(
            f"{where}: which column is the text? Say it with columns: {{caption: NAME}} or {{instruction: NAME}}; "
            f"it has: {', '.join(there)}"
        )
    return found


def _cell(value: Any, name: str) -> dict[str, Any]:
    """A picture's cell with its bytes; without any it is an empty one, which training skips and counts."""
    held = value.get("bytes") if isinstance(value, dict) else value
    return {"bytes": held if isinstance(held, bytes) else b"", "path": name}


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url}: {str(error).splitlines()[0]}") from error
