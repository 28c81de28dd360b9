"""Pairs to train on from any source: parquet with a reference, a target and a text, read in place.

    data = open_pairs("hf://datasets/primecai/dsd_data")        # a hub data set, streamed
    data = open_pairs("edits/", {"image": "after"})             # a folder of parquet files, one column named
    data = open_pairs("runs/other")                             # another run's pairs

The result has the interface of a run's pairs as training reads them: shards of rows, each to be validated by
`pairs.pair`. Nothing is copied; an fsspec address is streamed one row group at a time. Images must be in the rows;
paths are not opened. If files name their splits, those for training are read.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diptych.data.pairs import check_types, find_columns, named, pair
from diptych.data.store import MANIFEST, Dataset, reading
from diptych.errors import UsageError, UserError, describe, nearest
from diptych.utils import licenses
from diptych.utils.documents import parse_yaml, read_text
from diptych.utils.opening import folder_of
from diptych.utils.paths import inside, refuse_special

if TYPE_CHECKING:
    import pyarrow.parquet as pq

SHARD = 128  # maximum number of rows; a large row group is read once and split
READER = 2  # increase it when the rows read from equal files change


class Pairs(Protocol):
    """A data set of pairs, as training reads it."""

    url: str

    def shards(self) -> list[int]: ...

    def rows_in(self, shard: int) -> int: ...

    def read_shard(self, shard: int) -> list[dict[str, Any]]: ...

    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


def open_pairs(path: str, columns: Mapping[str, str] | None = None, split: str | None = None) -> Pairs:
    """Opens the pairs at a path or an fsspec address: a run, a data set that diptych published, or any parquet.

    Args:
        path: the folder, file or address.
        columns: column names of the data set, by ours ("conditioning", "image", "caption", "instruction"). Common
            names are recognized and can be left out.
        split: the split to read, or `all`; None reads the files for training (`choose`).

    Raises UserError if there is nothing to read or it is incomplete, UsageError for an unknown column or split.
    """
    url = path.rstrip("/")
    local = Path(url).expanduser()
    if "://" not in url:
        if not local.exists():
            kinds = "a run's folder, a folder of parquet files, or an fsspec address such as hf://datasets/OWNER/NAME"
            raise UserError("path_not_found", f"{path}: no such data; pass {kinds}")
        if (local / "pairs" / MANIFEST).is_file():
            local = local / "pairs"
        if (local / MANIFEST).is_file() and not columns:
            data = Dataset(local)
            data.check_complete()
            if split not in (None, TRAIN, ALL):
                raise UsageError("name_unknown", f"{local} has no split '{split}': all of its pairs are for training")
            return data
        url = str(local)
    return Parquet(url, columns, split)


def license_of(pairs: Pairs) -> str | None:
    """The license of pairs, as a card names it (`licenses.stated`): from their manifest, the teacher of their run, or
    the card beside them. None if none states it."""
    manifest = pairs.manifest if isinstance(pairs, Dataset) else None
    # Imports of earlier versions have the British spelling.
    known = (manifest or {}).get("license") or (manifest or {}).get("licence")
    if known:
        return None if known == "unknown" else known
    if "://" in pairs.url:
        with suppress(Exception):  # a hub that cannot be reached, or has no card
            system, root = _filesystem(pairs.url)
            return licenses.stated(licenses.front_fields(system.cat_file(f"{root}/README.md").decode("utf8")))
        return None
    folder = Path(pairs.url)
    if (recipe := folder.parent / "recipe.yaml").is_file() and isinstance(pairs, Dataset):
        with suppress(ValueError, OSError):
            teacher = str((parse_yaml(read_text(recipe), str(recipe)) or {}).get("teacher", ""))
            return licenses.stated(licenses.inherited(teacher, folder_of(teacher))[0])
    return licenses.stated(licenses.card_fields(folder if folder.is_dir() else folder.parent))


class Parquet:
    """A folder of parquet files, or one file, from any source."""

    def __init__(self, url: str, columns: Mapping[str, str] | None = None, split: str | None = None) -> None:
        self.url = url
        self._system, root = _filesystem(url)
        is_folder = self._system.isdir(root)
        self.files = sorted(self._system.glob(f"{root}/**/*.parquet")) if is_folder else [root]
        if "://" not in url and not is_folder:
            refuse_special(Path(url))
        for name in self.files if "://" not in url and is_folder else ():
            inside(Path(root), Path(name).relative_to(root).as_posix())
        if not self.files or not self._system.exists(self.files[0]):
            raise UserError("path_not_found", f"{url} has no parquet files")
        if is_folder:  # a file that is named is read, whatever its split
            held = {name[len(root) :]: name for name in self.files}
            self.files = [held[name] for name in choose(list(held), split, url)]
        self._places: list[tuple[int, int, int, int]] = []  # file, row group, its first row, number of rows
        self._digest = hashlib.sha256(repr((READER, sorted((columns or {}).items()))).encode())
        self.columns: dict[str, str] = {}  # ours → theirs
        self.there: list[str] = []  # all column names of the first file
        self._group: tuple[tuple[int, int, tuple[str, ...]], list[dict[str, Any]]] | None = None
        for number, name in enumerate(self.files):
            with self._open(number) as file:
                if not self.columns:
                    self.there = list(file.schema_arrow.names)
                    self.columns = find_columns(self.there, columns or {}, url)
                if missing := [theirs for theirs in self.columns.values() if theirs not in file.schema_arrow.names]:
                    raise UsageError(
                        "row_invalid", f"{name} has no column '{missing[0]}', which the files before it have"
                    )
                if file.metadata.num_rows:
                    check_types(file.schema_arrow, self.columns, name)
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
        """sha256 of the files' names, sizes and row groups, and of `columns`. Reads no image."""
        return self._digest.hexdigest()

    def read_shard(self, shard: int) -> list[dict[str, Any]]:
        """Rows as pairs, whose ids are their positions. A row that is not a pair is left for `pairs.pair` to reject."""
        number, group, first, _ = self._places[shard]
        columns = self.columns | {"grid_id": "grid_id"} if "grid_id" in self.there else self.columns
        rows = self.read_raw(shard, list(dict.fromkeys(columns.values())))
        result = []
        for place, raw in enumerate(rows, first):
            row = named(raw, columns) | {"id": f"{number:05d}-{group}-{place}"}
            with suppress(UserError):
                row = pair(row, place, decode=False)
            result.append(row)
        return result

    def read_raw(self, shard: int, names: list[str]) -> list[dict[str, Any]]:
        """Unchanged rows with these columns; columns that a file lacks are left out."""
        number, group, first, count = self._places[shard]
        key = (number, group, tuple(names))
        if self._group is None or self._group[0] != key:
            with reading(self.files[number]), self._open(number) as file:
                there = set(file.schema_arrow.names)
                table = file.read_row_group(group, columns=[name for name in names if name in there])
            self._group = (key, table.to_pylist())
        return self._group[1][first : first + count]

    def _open(self, number: int) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        with reading(self.files[number]):
            return pq.ParquetFile(self._system.open(self.files[number]), pre_buffer=False)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError("dependency_missing", f"{url}: {describe(error)}") from error


# Which files of a data set are read: those for training, unless a split is named. Data sets on the hub also have test
# and validation files, and mark them in the names of files and folders, as `datasets` reads them:
# `test-00000-of-00001.parquet`, `data/validation/0.parquet`.

TRAIN = "train"
ALL = "all"
HELD_OUT = {
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = HELD_OUT | {TRAIN: ("train", "training")}  # held-out names first, so that `train_test` is held out
_SHARD = re.compile(r"(.+?)-\d+-of-\d+.*")
_ENDING = re.compile(r"\.(parquet|tgz|tar(\.\w+)?)$")
log = logging.getLogger(__name__)


def split_of(name: str) -> str:
    """The split of a file, from its path in the data set; "" if the path names none."""
    *folders, file = name.strip("/").split("/")
    stem = _ENDING.sub("", file)
    for part in (stem, *reversed(folders)):
        if split := _known(part):
            return split
    shard = _SHARD.fullmatch(stem)
    return shard[1] if shard else ""


def _known(part: str) -> str:
    # Whole words only: `latest` is not a test split, `test2` and `my_test` are.
    words = set(re.findall(r"[a-z]+", part.lower()))
    return next((split for split, names in _WORDS.items() if words & set(names)), "")


def choose(files: Sequence[str], wanted: str | None, where: str) -> list[str]:
    """The files of a split, in order. `wanted` is its name, `all`, or None for training files.

    Files that name no split are training files. A warning reports files that are left out. UsageError for an unknown
    split, and for None if no file is clearly for training.
    """
    if wanted == ALL:
        return list(files)
    by: dict[str, list[str]] = {}
    for file in files:
        by.setdefault(split_of(file), []).append(file)
    counts = ", ".join(f"{name or 'no split'} ({len(names)} of {len(files)} files)" for name, names in by.items())
    training = by.keys() & {"", TRAIN}
    name = wanted and (_known(wanted) or wanted)
    if name is None:
        chosen = training or set(by)
        if not training and (len(by) > 1 or by.keys() & HELD_OUT.keys()):
            raise UsageError(
                "option_missing", f"{where}: no split for training; its files name {counts}; pass one, or all"
            )
    else:
        chosen = training if name == TRAIN else by.keys() & {name}
    if not chosen:
        hint = nearest(str(wanted), by)
        raise UsageError("name_unknown", f"{where} has no split '{wanted}'{hint}; its files name {counts}")
    selected = [file for file in files if split_of(file) in chosen]
    if wanted is None and len(selected) < len(files):
        log.warning("%s: reading %d of %d files, those for training: %s", where, len(selected), len(files), counts)
    return selected
