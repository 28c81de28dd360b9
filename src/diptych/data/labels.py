"""Human labels: a JSONL file that is only ever added to, and a spreadsheet that is filled in and read back.

A line is `{"id", "label", "labeller", "time"}`; the last line of a labeller about a pair holds. Each line is flushed to
the disk before the next, so a kill costs at most the label being given.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from diptych.errors import UsageError, UserError, nearest
from diptych.utils.documents import parse_json
from diptych.utils.paths import refuse_link
from diptych.utils.text_files import decode, read_text

LABELS = ("same", "different", "unsure")
SHEET = ("id", "label", "subject", "reference", "target")
_SHORT = {label[0]: label for label in LABELS}


class Labels:
    """A labels file. What a kill left of a last line is cut off, or ended if the line is whole."""

    def __init__(self, path: str | Path, choices: Sequence[str] = LABELS) -> None:
        self.path, self.choices = Path(path), choices
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            refuse_link(self.path)
            self._mend()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def add(self, id: str, label: str, labeller: str) -> None:
        """One label, on the disk when this returns."""
        assert label in self.choices, label
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"id": id, "label": label, "labeller": labeller, "time": now}
        try:
            with self.path.open("ab") as stream:
                stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: the label could not be written ({error.strerror or error})") from error

    def _mend(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        rest = data.rpartition(b"\n")[2]
        if not rest:
            return
        with self.path.open("rb+") as stream:
            if _is_json(rest):
                stream.seek(0, os.SEEK_END)
                stream.write(b"\n")
            else:
                stream.truncate(len(data) - len(rest))
            os.fsync(stream.fileno())


def read(path: str | Path) -> dict[str, dict[str, str]]:
    """`{labeller: {id: label}}` of a labels file. UsageError names a line that is no label; a cut last line is not one.

    A file that is not there raises UsageError.
    """
    path = Path(path)
    try:
        whole, end, rest = path.read_bytes().rpartition(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    if _is_json(rest):
        whole += end + rest
    found: dict[str, dict[str, str]] = {}
    for number, line in enumerate(decode(whole, str(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            pair, label, labeller = row["id"], row["label"], row["labeller"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} line {number}: not a label, {{id, label, labeller, time}}") from error
        if not isinstance(pair, str) or not isinstance(labeller, str):
            raise UsageError(f"{path} line {number}: id and labeller must be text")
        found.setdefault(labeller, {})[pair] = _label(label, f"{path} line {number}")
    return found


def write_sheet(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """A spreadsheet to fill in, with the columns of `SHEET`."""
    # What a spreadsheet would run as a formula gets the apostrophe that makes it text.
    safe = ([f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell for cell in row] for row in rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # With a byte order mark: without one Excel takes the file for Latin letters.
        with temporary.open("w", encoding="utf-8-sig", newline="") as stream:
            csv.writer(stream).writerows([SHEET, *safe])
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_sheet(path: Path) -> dict[str, str]:
    """`{id: label}` of a filled-in sheet; empty cells are left out. UsageError names the line that is wrong."""
    text = read_text(path)
    first = text.partition("\n")[0]
    # Spreadsheets of half the world write semicolons.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    missing = {"id", "label"} - set(reader.fieldnames or ())
    if missing:
        raise UsageError(f"{path}: the first line must name the columns {', '.join(SHEET)}; it lacks {min(missing)}")
    found: dict[str, str] = {}
    for row in reader:
        if (given := (row["label"] or "").strip()) and row["id"]:
            found[row["id"].removeprefix("'")] = _label(given.lower(), f"{path} line {reader.line_num}")
    return found


def _label(given: object, where: str) -> str:
    label = _SHORT.get(str(given), given)
    if label not in LABELS:
        raise UsageError(f"{where}: '{given}' is no label; write {', '.join(LABELS)}{nearest(str(given), LABELS)}")
    return str(label)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
