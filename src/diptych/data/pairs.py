"""Validation of pairs from other sources: the same checks for training and for import.

Columns are recognized by common names, or named by the user. Their types are checked before any row is read. `pair`
then turns a row into one of `records.PAIR`, or raises an error with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diptych.data.images import open_image
from diptych.data.records import IMAGE, PAIR
from diptych.errors import UsageError, UserError, nearest
from diptych.utils.io import sha256

if TYPE_CHECKING:
    import pyarrow as pa

SIDES = {"conditioning": "reference", "image": "target"}
TEXTS = ("caption", "instruction")
# Column names of hub data sets, those of the released data set first.
NAMES = {
    "conditioning": ("conditioning", "original_image", "input_image", "source_image", "reference"),
    "image": ("image", "edited_image", "target_image", "output_image", "target"),
    "caption": ("caption", "prompt", "text"),
    "instruction": ("instruction", "edit_prompt", "edit_instruction"),
}
TASK = "subject"  # of rows without a task
# Values that a row of another format lacks. Scores of curation stay empty.
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
_IDS = ("id", "grid_id")  # numbers in many data sets


def find_columns(existing: list[str], requested: Mapping[str, str], where: str) -> dict[str, str]:
    """Maps our column names to theirs.

    Args:
        existing: their column names.
        requested: columns that the user named, ours → theirs.
        where: the data set, for messages.

    Raises UsageError if a requested column does not exist, or no existing one fits.
    """
    has = f"it has: {', '.join(existing)}"
    for theirs in requested.values():
        if theirs not in existing:
            hint = nearest(theirs, existing)
            raise UsageError("row_invalid", f"{where} has no column '{theirs}'{hint}; {has}")
    columns = {ours: next((name for name in names if name in existing), "") for ours, names in NAMES.items()}
    columns = {ours: theirs for ours, theirs in (columns | dict(requested)).items() if theirs}
    for ours, role in SIDES.items():
        if ours not in columns:
            message = f"{where}: no known column for the {role} image; set columns: {{{ours}: NAME}}; {has}"
            raise UsageError("row_invalid", message)
    if not columns.keys() & set(TEXTS):
        fix = "set columns: {caption: NAME} or {instruction: NAME}"
        raise UsageError("row_invalid", f"{where}: no known column for the text; {fix}; {has}")
    return columns


def check_types(schema: pa.Schema, columns: Mapping[str, str], where: str) -> None:
    """UsageError if a column of images or texts has another type. The message names the column and the type."""
    for ours, theirs in columns.items():
        kind = schema.field(theirs).type
        if ours in SIDES:
            needed, fits = f"bytes, or a struct with `bytes`, for the {SIDES[ours]} images", _holds_bytes(kind)
        else:
            needed, fits = f"text for the {ours}", _holds_text(kind)
        if not fits:
            raise UsageError(
                "row_invalid",
                f"{where}: column '{theirs}' has the type {kind}; it needs {needed}. Change its type, or set another "
                f"column with columns: {{{ours}: NAME}}",
            )


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = getattr(kind, "storage_type", kind)  # of an extension type
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        return "bytes" in names and _holds_bytes(kind.field(names.index("bytes")).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = getattr(kind, "storage_type", kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # A column that is null throughout one file may have texts in the next.
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def named(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row under our names (`names`: ours → theirs). Other values go into `evidence`, if JSON can store them."""
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


def pair(values: Mapping[str, Any], number: int, task: str = TASK, decode: bool = True) -> dict[str, Any]:
    """A complete row of `records.PAIR`. UserError, with the reason, if it is not a pair.

    Images are decoded once as a check, unless `decode` is False. Their bytes stay as they are; paths are dropped.
    """
    row: dict[str, Any] = {}
    for side in SIDES:
        row[side] = {"bytes": _image(side, values.get(side)), "path": None}
        if decode:
            open_image(row[side], name=side)
    for column, kind in PAIR.items():
        if kind != IMAGE:
            row[column] = _value(column, kind, values.get(column))
    row["caption"] = row["caption"] if row["caption"].strip() else row["instruction"]
    if not row["caption"].strip():
        raise UserError("row_invalid", "no text: neither a caption nor an instruction")
    row["id"] = row["id"] or f"i-{number:06d}"
    # Pairs with the same reference are held out of training together.
    row["grid_id"] = row["grid_id"] or sha256(row["conditioning"]["bytes"])[:16]
    row["task"] = row["task"] or task
    row["evidence"] = row["evidence"] or "{}"
    return row


def _image(side: str, cell: Any) -> bytes:
    """The bytes of an image cell. A path in a row is never opened."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes) and data:
        return data
    if isinstance(cell, dict) and cell.get("path"):
        raise UserError("image_missing", f"{side} has a path and no image; export the data set with embedded images")
    raise UserError("image_missing", f"{side}: no image")


def _value(column: str, kind: str, value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None:
        return _DEFAULTS.get(column, "" if kind == "string" else None)
    if column in _IDS and isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        value = str(int(value))
    expected, description = _KINDS[kind]
    if kind == "float64" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError("row_invalid", f"{column} is {json.dumps(value, default=str)[:40]}, not {description}")
    if kind == "int64" and not -(2**63) <= value < 2**63:
        raise UserError("row_invalid", f"{column} is {value}, which does not fit in 64 bits")
    if kind == "string":
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError("row_invalid", f"{column} has half a character, which UTF-8 cannot encode") from None
    return value
