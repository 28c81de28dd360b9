"""Human labels: an append-only JSONL file, and a spreadsheet to fill in and read back.

A line is `{"id", "label", "labeller", "time"}`; a labeller's last line about a pair is valid. Each line is flushed to
the disk before the next, so an interruption costs at most one label.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diptych.data import records
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError, nearest
from diptych.utils.documents import decode, parse_json, read_text
from diptych.utils.io import write_atomic
from diptych.utils.paths import place, refuse_link

LABELS = ("same", "different", "unsure")
SHEET = ("id", "label", "subject", "reference", "target")
_SHORT = {label[0]: label for label in LABELS}


class Labels:
    """A labels file. An incomplete last line is removed; a complete one without a newline gets it."""

    def __init__(self, path: str | Path, choices: Sequence[str] = LABELS) -> None:
        self.path, self.choices = Path(path), choices
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            refuse_link(self.path)
            self._repair()
        except OSError as error:
            raise UserError("path_unwritable", f"cannot write {self.path}: {error.strerror or error}") from error

    def add(self, id: str, label: str, labeller: str) -> None:
        """Appends one label. It is on the disk when this returns."""
        assert label in self.choices, label
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"id": id, "label": label, "labeller": labeller, "time": now}
        try:
            with self.path.open("ab") as stream:
                stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError("path_unwritable", f"cannot write {self.path}: {error.strerror or error}") from error

    def _repair(self) -> None:
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
    """Reads `{labeller: {id: label}}` from a labels file. An incomplete last line is ignored.

    UsageError for a file that cannot be read, and, with its number, for a line that is not a label.
    """
    try:
        lines = list(_lines(Path(path)))
    except OSError as error:
        raise UsageError("path_unreadable", f"cannot read {path}: {error.strerror or error}") from error
    labels: dict[str, dict[str, str]] = {}
    for where, row in lines:
        try:
            pair, label, labeller = row["id"], row["label"], row["labeller"]
        except (KeyError, TypeError) as error:
            raise UsageError("labels_invalid", f"{where}: not a label, {{id, label, labeller, time}}") from error
        if not isinstance(pair, str) or not isinstance(labeller, str):
            raise UsageError("labels_invalid", f"{where}: id and labeller must be text")
        labels.setdefault(labeller, {})[pair] = _label(label, where)
    return labels


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of each line, without an incomplete last one. The value is None for invalid JSON."""
    whole, end, rest = path.read_bytes().rpartition(b"\n")
    if _is_json(rest):
        whole += end + rest
    for number, line in enumerate(decode(whole, str(path)).split("\n"), 1):
        if line.strip():
            value = None
            with suppress(ValueError):
                value = parse_json(line)
            yield f"{path} line {number}", value


def write_sheet(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Writes a spreadsheet to fill in, with the columns of `SHEET`."""
    # An apostrophe turns what a spreadsheet would run as a formula into text.
    safe = ([f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell for cell in row] for row in rows)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([SHEET, *safe])
    # Excel needs a byte order mark to recognize UTF-8.
    write_atomic(path, text.getvalue().encode("utf-8-sig"))


def read_sheet(path: Path) -> dict[str, str]:
    """Reads `{id: label}` from a sheet; empty cells are left out. UsageError names the invalid line."""
    text = read_text(path)
    first = text.partition("\n")[0]
    # In many languages, spreadsheets write semicolons.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    missing = {"id", "label"} - set(reader.fieldnames or ())
    if missing:
        raise UsageError(
            "labels_invalid", f"{path}: the first line lacks the column {min(missing)}; it needs {', '.join(SHEET)}"
        )
    labels: dict[str, str] = {}
    for row in reader:
        if (text := (row["label"] or "").strip()) and row["id"]:
            labels[row["id"].removeprefix("'")] = _label(text.lower(), f"{path} line {reader.line_num}")
    return labels


def _label(value: object, where: str) -> str:
    label = _SHORT.get(str(value), value)
    if label not in LABELS:
        hint = nearest(str(value), LABELS)
        raise UsageError("labels_invalid", f"{where}: '{value}' is not a label; use {', '.join(LABELS)}{hint}")
    return str(label)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


# Decisions of people on pairs. `audit/decisions.jsonl` is append-only and does not change its run. `accept` takes a
# pair whatever its scores, `reject` excludes it, and `judge` leaves it to the judge and the thresholds. The last line
# about two panels is valid, for both of their orders, (a, b) and (b, a). `diptych data recurate RUN --out NEW` makes
# a run that follows the decisions. They are then frozen in its `decisions.json`, which its fingerprint includes, as
# the recipe is frozen in `recipe.yaml`, so later decisions cannot change the pairs that it was trained on.

VERDICTS = ("accept", "reject", "judge")
FIXED = "decisions.json"


def path(run_dir: str | Path) -> Path:
    """The file of people's decisions on a run."""
    return place(run_dir) / "audit" / "decisions.jsonl"


def add(run_dir: str | Path, id: str, verdict: str, who: str) -> None:
    """Appends one decision. It is on the disk when this returns."""
    Labels(path(run_dir), VERDICTS).add(id, verdict, who)


def decided(run_dir: str | Path) -> dict[str, bool]:
    """`{pair: accepted}` of the pairs that people decided on, under the id (of either order) that was used last.

    Empty if there is no file. UserError for an invalid line.
    """
    file, decisions = path(run_dir), {}
    for where, row in _lines(file) if file.is_file() else ():
        try:
            id, verdict = str(row["id"]), row["label"]
        except (KeyError, TypeError):
            raise UserError("labels_invalid", f"{where}: not a decision, {{id, label, labeller, time}}") from None
        for same in (id, *records.mirrors(id)):
            decisions.pop(same, None)
        if verdict != "judge":
            decisions[id] = verdict == "accept"
    return decisions


def both_ways(decided: Mapping[str, bool]) -> dict[str, bool]:
    """Decisions under the ids of both orders of the panels."""
    return {one: accepted for id, accepted in decided.items() for one in (id, *records.mirrors(id))}


def counts(decided: Mapping[str, bool]) -> dict[str, int]:
    """Number of decisions that accept, and that reject."""
    return {"accepted": sum(decided.values()), "rejected": len(decided) - sum(decided.values())}


def applied(run_dir: str | Path) -> dict[str, bool]:
    """`{pair: accepted}` of the decisions that a run's `pairs/` follows; empty for a run without decisions."""
    file = place(run_dir) / FIXED
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        raise UserError("json_invalid", f"{file}: invalid JSON; make the run again in another --out") from None


def fix(out: Path, decided: Mapping[str, bool]) -> None:
    """Freezes the decisions of a new run, before its `pairs/` is made. UsageError if the folder follows others."""
    if applied(out) == decided:
        return
    if (out / FIXED).exists() or Dataset(out / "pairs").shards():
        raise UsageError("run_mismatch", f"{out}: a run that was made with other decisions; choose another --out")
    write_atomic(out / FIXED, json.dumps(dict(sorted(decided.items())), indent=1).encode() + b"\n")


def copy(run_dir: Path, out: Path) -> None:
    """Copies the decisions on a run to a new run of the same grids, unless that has some."""
    if decided(run_dir) and not path(out).exists():
        path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path(out), path(run_dir).read_bytes())
