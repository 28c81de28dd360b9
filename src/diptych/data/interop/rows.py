"""The protocol that every format follows, and what they share.

A reader gives entries in an order that never changes, each with a place to name in a message and a way to read it. What
it reads becomes a row of `records.PAIR` in `data.pairs`, so that all formats check, name and refuse in the same way.
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

    columns: Mapping[str, str] = field(default_factory=dict)  # ours → theirs, where they are called unusually
    text: str = "caption"  # what the one text of a format that has one is: caption or instruction
    task: str = TASK  # of rows that do not say
    split: str | None = None  # which files, where their names say; None: those to train on


@dataclass(frozen=True)
class Entry:
    """One row that has not been read yet."""

    where: str  # the file, and the place in it
    load: Callable[[], dict[str, Any]]  # our columns, pictures as bytes; UserError if it cannot be read


class Reader(Protocol):
    """A data set in another format."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Changes when a file is added, taken away, or has another size."""
        ...

    def entries(self, start: int) -> Iterator[Entry]:
        """From row `start` on, in an order that never changes."""
        ...


@dataclass(frozen=True)
class Format:
    """One format: how it is read, and how it is written a shard at a time."""

    name: str
    about: str
    open: Callable[[str, Options], Reader]
    # (folder, shard, of how many, (name, row) of each row, options) → what `finish` needs to know of each row
    write: Callable[[Path, int, int, Sequence[tuple[str, dict[str, Any]]], Options], list[dict[str, Any]]]
    finish: Callable[[Path, Iterable[dict[str, Any]], Options], None]  # writes what lists all rows, last
    whole: bool  # whether every column comes back, or only pictures, name and text
    loads: str  # how others open it, for the card; {folder} is its path


def told(row: Mapping[str, Any], text: str) -> str:
    """The text of a format that has one: the instruction if it is wanted and there is one, else the caption."""
    return (row["instruction"] if text == "instruction" and row["instruction"] else row["caption"]).strip()


def file_name(row: Mapping[str, Any], number: int) -> str:
    """A row's name as files can have it: its id, or its number where an id holds what a name must not."""
    name = row["id"]
    return name if _NAME.fullmatch(name) and not _GIVEN.fullmatch(name) else f"row-{number:06d}"


def extension(data: bytes) -> str:
    """What a picture's file is called, by its own first bytes."""
    import io

    from PIL import Image

    try:
        return EXTENSIONS.get(Image.open(io.BytesIO(data)).format or "", ".png")
    except OSError as error:
        raise UserError(f"a picture that cannot be read: {error}") from error


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """All of a row but its pictures, as JSON can hold it."""
    return {key: _plain(row[key]) for key, kind in PAIR.items() if kind != IMAGE}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
