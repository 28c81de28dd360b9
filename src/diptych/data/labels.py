"""Human labels: a JSONL file that is only ever added to, and a spreadsheet that is filled in and read back.

A line is `{"id", "label", "labeller", "time"}`; the last line of a labeller about a pair holds. Each line is flushed to
the disk before the next, so a kill costs at most the label being given.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

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
    text = io.StringIO(newline="")
    csv.writer(text).writerows([SHEET, *safe])
    # With a byte order mark: without one Excel takes the file for Latin letters.
    write_atomic(path, text.getvalue().encode("utf-8-sig"))


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


# People's own verdicts on pairs. What they said of a run, and which of it a run's `pairs/` follows.
# `audit/decisions.jsonl` is only ever added to, and changes nothing of its run: `accept` takes a pair whatever its
# numbers say, `reject` keeps it out, and `judge` leaves it to the judge and the thresholds again. The last line about
# two panels holds, and it holds for both of their orders, (a, b) and (b, a). `diptych data recurate RUN --out NEW`
# makes a run that follows them. They are then fixed in its `decisions.json`, which its fingerprint names, as its
# recipe is fixed in `recipe.yaml`; so what people say of a run later cannot make its pairs others than those it was
# trained on.

VERDICTS = ("accept", "reject", "judge")
FIXED = "decisions.json"


def path(run_dir: str | Path) -> Path:
    """The file of what people said of a run."""
    return place(run_dir) / "audit" / "decisions.jsonl"


def add(run_dir: str | Path, id: str, verdict: str, who: str) -> None:
    """One decision, on the disk when this returns."""
    Labels(path(run_dir), VERDICTS).add(id, verdict, who)


def decided(run_dir: str | Path) -> dict[str, bool]:
    """`{pair: accepted}` of the pairs that people decided on, each under the one of its two ids that was named last;
    empty if there is no file. UserError for a wrong line."""
    file, found = path(run_dir), {}
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            id, verdict = str(row["id"]), row["label"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # cut by a kill; the next decision mends it
            raise UserError(f"{file} line {number}: not a decision, {{id, label, labeller, time}}") from None
        for same in (id, *records.mirrors(id)):
            found.pop(same, None)
        if verdict != "judge":
            found[id] = verdict == "accept"
    return found


def both_ways(decided: Mapping[str, bool]) -> dict[str, bool]:
    """Decisions under the ids of both orders of the panels."""
    return {one: accepted for id, accepted in decided.items() for one in (id, *records.mirrors(id))}


def counts(decided: Mapping[str, bool]) -> dict[str, int]:
    """How many decisions accept and how many reject two panels."""
    return {"accepted": sum(decided.values()), "rejected": len(decided) - sum(decided.values())}


def applied(run_dir: str | Path) -> dict[str, bool]:
    """`{pair: accepted}` of the decisions that a run's `pairs/` follows; empty for a run that was made without."""
    file = place(run_dir) / FIXED
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        raise UserError(f"{file} is not valid JSON; make the run again in another --out") from None


def fix(out: Path, decided: Mapping[str, bool]) -> None:
    """Makes a new run follow `decided`, before its `pairs/` is made. UsageError if the folder follows others."""
    if applied(out) == decided:
        return
    if (out / FIXED).exists() or Dataset(out / "pairs").shards():
        raise UsageError(f"{out} holds a run that was made with other decisions of people; choose another --out")
    write_atomic(out / FIXED, json.dumps(dict(sorted(decided.items())), indent=1).encode() + b"\n")


def copy(run_dir: Path, out: Path) -> None:
    """What people said of a run, for a new run of the same grids, unless they said something of that already."""
    if decided(run_dir) and not path(out).exists():
        path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path(out), path(run_dir).read_bytes())
