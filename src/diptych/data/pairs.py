"""A row of somebody else's data as a pair, or the reason why not: the one set of checks, for training and for import.

Columns are found by the names that people use, or named; their types are looked at before any row is read. A row then
becomes one of `records.PAIR` in `pair`, which refuses a row that is not a pair and says why.
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
# What hub data sets call their columns (the released data set's names first).
NAMES = {
    "conditioning": ("conditioning", "original_image", "input_image", "source_image", "reference"),
    "image": ("image", "edited_image", "target_image", "output_image", "target"),
    "caption": ("caption", "prompt", "text"),
    "instruction": ("instruction", "edit_prompt", "edit_instruction"),
}
TASK = "subject"  # of rows that do not say
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
_IDS = ("id", "grid_id")  # numbers in many data sets


def find_columns(there: list[str], asked: Mapping[str, str], where: str) -> dict[str, str]:
    """Ours → theirs. UsageError for an asked one that is not there, or a needed one that nothing there is called."""
    for theirs in asked.values():
        if theirs not in there:
            raise UsageError(f"{where} has no column '{theirs}'{nearest(theirs, there)}; it has: {', '.join(there)}")
    found = {ours: next((name for name in names if name in there), "") for ours, names in NAMES.items()}
    found = {ours: theirs for ours, theirs in (found | dict(asked)).items() if theirs}
    for ours, role in SIDES.items():
        if ours not in found:
            raise UsageError(
                f"{where}: which column is the {role} picture? "
                f"Say it with columns: {{{ours}: NAME}}; it has: {', '.join(there)}"
            )
    if "caption" not in found and "instruction" not in found:
        raise UsageError(
            f"{where}: which column is the text? Say it with columns: {{caption: NAME}} or {{instruction: NAME}}; "
            f"it has: {', '.join(there)}"
        )
    return found


def check_types(schema: pa.Schema, columns: Mapping[str, str], where: str) -> None:
    """UsageError for a column of pictures or texts that holds something else in every row, named with what it holds."""
    for ours, theirs in columns.items():
        kind = schema.field(theirs).type
        if ours in SIDES:
            wanted, fits = f"the {SIDES[ours]} pictures (binary, or a struct with `bytes`)", _holds_bytes(kind)
            cure = "put the pictures' bytes into the rows"
        else:
            wanted, fits = f"the {ours}, one text a row", _holds_text(kind)
            cure = "make it one text"
        if not fits:
            raise UsageError(
                f"{where}: column '{theirs}' is read as {wanted}, and holds {kind}; "
                f"{cure}, or name another column with columns: {{{ours}: NAME}}"
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
    # A column that is null in every row of one file may have texts in the next.
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


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


def pair(values: Mapping[str, Any], number: int, task: str = TASK, decode: bool = True) -> dict[str, Any]:
    """A complete row of `records.PAIR`. UserError, with the reason, if it is not a pair.

    Pictures are decoded once, to know that they can be; their bytes stay as they are, their paths are dropped.
    `decode=False` leaves that to whoever opens them.
    """
    row: dict[str, Any] = {}
    for side in SIDES:
        row[side] = {"bytes": _picture(side, values.get(side)), "path": None}
        if decode:
            open_image(row[side], name=side)
    for column, kind in PAIR.items():
        if kind != IMAGE:
            row[column] = _value(column, kind, values.get(column))
    row["caption"] = row["caption"] if row["caption"].strip() else row["instruction"]
    if not row["caption"].strip():
        raise UserError("there is no text, neither a caption nor an instruction")
    row["id"] = row["id"] or f"i-{number:06d}"
    # Pairs of one reference are held out of training together.
    row["grid_id"] = row["grid_id"] or sha256(row["conditioning"]["bytes"])[:16]
    row["task"] = row["task"] or task
    row["evidence"] = row["evidence"] or "{}"
    return row


def _picture(side: str, cell: Any) -> bytes:
    """The bytes of a picture's cell. What a path in a row names on this machine is none of its business."""
    held = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(held, bytes) and held:
        return held
    if isinstance(cell, dict) and cell.get("path"):
        raise UserError(f"{side} holds a path and no picture; embed the pictures, and export the data set again")
    raise UserError(f"{side}: there is no picture")


def _value(column: str, kind: str, value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None:
        return _DEFAULTS.get(column, "" if kind == "string" else None)
    if column in _IDS and isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        value = str(int(value))
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
