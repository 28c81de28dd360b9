"""The protocol of all formats, and their common functions.

A reader yields entries in a fixed order, each with its place, for messages, and a function that reads it. `data.pairs`
turns the result into a row of `records.PAIR`, so that all formats have the same checks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from diptych.data.pairs import TASK
from diptych.data.records import IMAGE, PAIR
from diptych.errors import UserError

EXTENSIONS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_GIVEN = re.compile(r"row-\d+")


@dataclass(frozen=True)
class Options:
    """How a data set is read or written."""

    columns: Mapping[str, str] = field(default_factory=dict)  # ours → theirs, for names that are not recognized
    text: str = "caption"  # what the text of a format with one text is: caption or instruction
    task: str = TASK  # of rows without a task
    split: str | None = None  # split to read; None is the training files


@dataclass(frozen=True)
class Entry:
    """A row that has not been read yet."""

    where: str  # the file, and the place in it
    load: Callable[[], dict[str, Any]]  # returns our columns, images as bytes; UserError if it cannot be read


class Reader(Protocol):
    """A data set in another format."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A hash that changes if a file is added or removed, or has another size."""
        ...

    def entries(self, start: int) -> Iterator[Entry]:
        """Yields the entries from row `start` on, in a fixed order."""
        ...


NamedRows = Sequence[tuple[str, dict[str, Any]]]  # (name of its files, row)


@dataclass(frozen=True)
class Format:
    """A format: how it is read, and how it is written shard by shard."""

    name: str
    about: str
    open: Callable[[str, Options], Reader]
    write: Callable[[Path, int, int, NamedRows, Options], list[dict[str, Any]]]
    """Writes a shard: (folder, shard, number of shards, rows, options) → a record of each row for `finish`."""
    whole: bool
    """Whether every column is stored, or only images, name and text."""
    loads: str
    """How others open the folder, for the card; {folder} is its path."""
    finish: Callable[[Path, Iterable[dict[str, Any]], Options], None] | None = None
    """Writes the list of all rows, last."""


def text_of(row: Mapping[str, Any], text: str) -> str:
    """The text for a format with one text: the instruction if `text` says so and the row has one, else the caption."""
    return (row["instruction"] if text == "instruction" and row["instruction"] else row["caption"]).strip()


def file_name(row: Mapping[str, Any], number: int) -> str:
    """A row's name for files: its id, or its number if the id is not a safe file name."""
    name = row["id"]
    return name if _NAME.fullmatch(name) and not _GIVEN.fullmatch(name) else f"row-{number:06d}"


def extension(data: bytes) -> str:
    """Suffix of an image file, by its first bytes."""
    import io

    from PIL import Image

    try:
        return EXTENSIONS.get(Image.open(io.BytesIO(data)).format or "", ".png")
    except OSError as error:
        raise UserError("image_unreadable", f"an image cannot be read: {error}") from error


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its images, as JSON values."""
    return {key: _plain(row[key]) for key, kind in PAIR.items() if kind != IMAGE}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
