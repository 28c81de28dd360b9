"""`diptych data export`: pairs become a folder that other trainers, and `datasets`, open as it is.

A shard is written and then noted in OUT/.export; killed and started again, the export goes on after the last note. At
its end it is read back through the format's own reader and held against the source, row by row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.data.interop import card, find
from diptych.data.interop.folders import put, read_json
from diptych.data.interop.rows import Format, Options, columns_of, file_name, told
from diptych.data.pairs import SIDES, pair
from diptych.data.places import lock
from diptych.data.sources import Pairs, open_pairs
from diptych.errors import UsageError, UserError
from diptych.utils.console import Report
from diptych.utils.io import sha256, sha256_json

VERSION = 1
NOTES = ".export"
MADE = "diptych.json"  # what the finished export says of itself


def export_data(
    source: str,
    out: str | Path,
    format: str,
    options: Options | None = None,
    *,
    verify: bool = True,
    report: Report | None = None,
) -> dict[str, Any]:
    """Writes the pairs of `source` (a run, an import, any parquet of pairs) to the folder `out`; returns counts.

    Pairs that curation did not keep are left out. Pictures keep their bytes.

    Raises UsageError for an unknown format or a folder that holds something else, UserError where a row cannot be
    written or, read back, is not what it was.
    """
    options = options or Options()
    kind = find(format)
    out = Path(out)
    data = open_pairs(source)
    asked = ["export", VERSION, format, data.fingerprint(), options.text]
    fingerprint = sha256_json(asked)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    _check_free(out, fingerprint)
    with lock(out):
        if not (out / MADE).is_file():
            put(out / NOTES / "job.json", json.dumps({"fingerprint": fingerprint}).encode())
            _write(data, kind, options, out, report)
            rows = sum(1 for _ in _notes(out, "rows"))
            digest = _verified(kind, options, out, report) if verify else ""
            put(out / "README.md", card.of_export(source, data, kind, rows).encode())
            made = {"fingerprint": fingerprint, "format": format, "rows": rows, "text": options.text}
            made |= {"data": data.fingerprint(), "verified": digest}
            put(out / MADE, (json.dumps(made, indent=2) + "\n").encode())
        shutil.rmtree(out / NOTES, ignore_errors=True)  # a kill may have left them
        made = read_json(out / MADE)
    return {"out": str(out), "format": format, "rows": made["rows"], "verified": bool(made["verified"])}


def check(out: Path) -> int:
    """Reads a finished export again and holds all its rows against the hash of those it verified; returns how many.

    Raises UserError where something differs, or where the export was never verified.
    """
    made = read_json(out / MADE)
    if not made.get("verified"):
        raise UserError(f"{out} was exported with --no-verify, so nothing says what its rows were; export it again")
    kind, options = find(made["format"]), Options(text=made["text"])
    found: dict[str, str] = {}
    for number, entry in enumerate(kind.open(str(out), options).entries(0)):
        row = pair(entry.load(), number, options.task)
        found[row["id"]] = _digest(row, kind, options)
    if len(found) != made["rows"] or _whole(found) != made["verified"]:
        raise UserError(f"{out}: its rows are not those that were exported; export it again into another folder")
    return len(found)


def _check_free(out: Path, fingerprint: str) -> None:
    if not out.is_dir():
        return
    for path in (out / MADE, out / NOTES / "job.json"):
        if path.is_file():
            if read_json(path).get("fingerprint") != fingerprint:
                raise UsageError(f"{out} holds another export, or one of other data; choose another folder")
            return
    if others := sorted(p.name for p in out.iterdir() if p.name != ".lock"):
        raise UsageError(f"{out} holds {others[0]} already; choose another folder")


def _rows(data: Pairs, options: Options, shard: int, start: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, complete row) of the pairs of a shard that curation kept; `start` is the first row's number."""
    for number, row in enumerate(data.read_shard(shard), start):
        if row.get("kept", True):
            try:
                whole = pair(row, number, options.task, decode=False)
            except UserError as error:
                raise UserError(f"{data.url}, row {number} ({row.get('id', '')}): {error}") from error
            yield file_name(whole, number), whole


def _write(data: Pairs, kind: Format, options: Options, out: Path, report: Report | None) -> None:
    shards = data.shards()
    start, total = 0, len(data)
    names: set[str] = set()
    for place, shard in enumerate(shards):
        note = out / NOTES / f"{place:05d}.json"
        if note.is_file():
            names |= {name.lower() for name, _, _ in read_json(note)["rows"]}
        else:
            rows = list(_rows(data, options, shard, start))
            for name, row in rows:
                # Two names that a file system may take for one would overwrite each other.
                if name.lower() in names:
                    raise UserError(f"{data.url} has two rows with the id {row['id']}; ids must differ")
                names.add(name.lower())
            records = kind.write(out, place, len(shards), rows, options)
            noted = [[name, row["id"] if kind.whole else name, _digest(row, kind, options)] for name, row in rows]
            put(note, json.dumps({"rows": noted, "records": records}, ensure_ascii=False).encode())
        start += data.rows_in(shard)
        if report:
            report(start, total, "written")
    kind.finish(out, _notes(out, "records"), options)


def _notes(out: Path, key: str) -> Iterator[Any]:
    for note in sorted((out / NOTES).glob("[0-9]*.json")):
        yield from read_json(note)[key]


def _verified(kind: Format, options: Options, out: Path, report: Report | None) -> str:
    """sha256 over what all rows hold, after every row read back was compared with what was noted of it."""
    wanted = {id: digest for _, id, digest in _notes(out, "rows")}
    total = len(wanted)
    whole = _whole(wanted)
    # By id: folders list their files by name, not in the source's order.
    for number, entry in enumerate(kind.open(str(out), options).entries(0)):
        row = pair(entry.load(), number, options.task)
        if wanted.pop(row["id"], None) != _digest(row, kind, options):
            raise UserError(f"{out}, {entry.where}: read back, it is not what was written; is the disk whole?")
        if report and number % 64 == 0:
            report(min(number, total), total, "verified")
    if wanted:
        raise UserError(f"{out}: {len(wanted)} rows cannot be read back, first {next(iter(wanted))}")
    return whole


def _whole(digests: dict[str, str]) -> str:
    """One hash of all rows' hashes, whatever order they were read in."""
    return sha256("".join(digests[id] for id in sorted(digests)))


def _digest(row: dict[str, Any], kind: Format, options: Options) -> str:
    """What the format must keep of a row: everything, or the pictures and the text."""
    digest = hashlib.sha256()
    for side in SIDES:
        digest.update(hashlib.sha256(row[side]["bytes"]).digest())
    kept = columns_of(row) if kind.whole else {"text": told(row, options.text)}
    return digest.hexdigest() + sha256_json(kept)
