"""A row of somebody else's data set as one of ours, or the reason why not; and the protocol that every format follows.

A reader gives entries in an order that never changes, each with a place to name in a message and a way to read it. What
it reads becomes a row of `records.PAIR` here, so that all formats check, name and refuse in the same way.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from diptych.data.images import open_image
from diptych.data.records import IMAGE, PAIR
from diptych.errors import UserError

SIDES = ("conditioning", "image")
TEXTS = ("caption", "instruction")
EXTENSIONS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_GIVEN = re.compile(r"row-\d+")
# What a row of another format does not say. Numbers of a curation that was not ours stay empty.
_DEFAULTS: dict[str, Any] = {
    "caption": "",
    "instruction": "",
    "reference_caption": "",
    "subject": "",
    "reference_panel": 0,
    "target_panel": 1,
    "seed": 0,
    "kept": True,
    "reason": "kept",
    "judge": "",
}
_KINDS = {
    "string": (str, "a text"),
    "int64": (int, "a whole number"),
    "float64": (float, "a number"),
    "bool": (bool, "true or false"),
}


@dataclass(frozen=True)
class Options:
    """How a data set is read or written."""

    columns: Mapping[str, str] = field(default_factory=dict)  # ours → theirs, where they are called unusually
    text: str = "caption"  # what the one text of a format that has one is: caption or instruction
    task: str = "subject"  # of rows that do not say


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


def named(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row of theirs under our names (`names`: ours → theirs); what is neither goes into `evidence`, if JSON can."""
    out = {ours: values.get(theirs) for ours, theirs in names.items()}
    taken, extra = set(names.values()), {}
    for key, value in values.items():
        if key in taken:
            continue
        if key in PAIR and key not in out:
            out[key] = value
        elif value is not None and _is_plain(value):
            extra[key] = value
    if extra and "evidence" not in out:
        out["evidence"] = json.dumps({"imported": extra}, sort_keys=True, ensure_ascii=False)
    return out


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def pair(values: Mapping[str, Any], number: int, options: Options, decode: bool = True) -> dict[str, Any]:
    """A complete row of `records.PAIR`. UserError, with the reason, for what is no pair.

    Pictures are decoded once, to know that they can be; their bytes stay as they are, their paths are dropped.
    `decode=False` leaves that to whoever reads the row back.
    """
    row: dict[str, Any] = {}
    for side in SIDES:
        held = values.get(side)
        held = held.get("bytes") if isinstance(held, dict) else held
        if not isinstance(held, bytes) or not held:
            raise UserError(f"{side}: there is no picture")
        if decode:
            open_image(held, name=side)
        row[side] = {"bytes": held, "path": None}
    for column, kind in PAIR.items():
        if kind != IMAGE:
            row[column] = _value(column, kind, values.get(column))
    row["caption"] = row["caption"] or row["instruction"]
    if not row["caption"].strip():
        raise UserError("there is no text, neither a caption nor an instruction")
    row["id"] = row["id"] or f"i-{number:06d}"
    # Pairs of one reference are held out of training together.
    row["grid_id"] = row["grid_id"] or hashlib.sha256(row["conditioning"]["bytes"]).hexdigest()[:16]
    row["task"] = row["task"] or options.task
    row["evidence"] = row["evidence"] or "{}"
    return row


def _value(column: str, kind: str, value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None:
        return _DEFAULTS.get(column, "" if kind == "string" else None)
    wanted, word = _KINDS[kind]
    if kind == "float64" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise UserError(f"{column} is {json.dumps(value, default=str)[:40]}, not {word}")
    if kind == "int64" and not -(2**63) <= value < 2**63:
        raise UserError(f"{column} is {value}, more than 64 bits hold")
    if kind == "string":
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{column} holds half a character, which no text in UTF-8 can") from None
    return value


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
