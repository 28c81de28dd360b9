"""`diptych data export`: pairs become a folder that other trainers, and `datasets`, can open.

A shard is written and then noted in OUT/.export, so that an interrupted export resumes after the last note. At the end
it is read back through the format's reader and compared with the source, row by row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diptych.data.interop import card, find
from diptych.data.interop.folders import read_json
from diptych.data.interop.importing import check_folder, check_free
from diptych.data.interop.rows import Format, Options, columns_of, file_name, text_of
from diptych.data.pairs import SIDES, pair
from diptych.data.places import lock
from diptych.data.sources import Pairs, open_pairs
from diptych.errors import UsageError, UserError
from diptych.utils.console import Report
from diptych.utils.io import sha256, sha256_json, write_atomic

VERSION = 1
NOTES = ".export"
MADE = "diptych.json"  # describes a finished export


def export_data(
    source: str,
    out: str | Path,
    format: str,
    options: Options | None = None,
    *,
    verify: bool = True,
    report: Report | None = None,
) -> dict[str, Any]:
    """Exports the pairs of `source` (a run, an import, any parquet of pairs) to the folder `out`. Returns counts.

    Pairs that curation rejected are left out. Images keep their bytes.

    Raises UsageError for an unknown format or a folder that has other files, UserError if a row cannot be written or
    differs when it is read back.
    """
    options = options or Options()
    kind = find(format)
    out = Path(out)
    data = open_pairs(source)
    fingerprint = sha256_json(["export", VERSION, format, data.fingerprint(), options.text])
    check_folder(out)
    _check_free(out, fingerprint)
    with lock(out):
        if not (out / MADE).is_file():
            write_atomic(out / NOTES / "job.json", json.dumps({"fingerprint": fingerprint}).encode())
            _write(data, kind, options, out, report)
            rows = sum(1 for _ in _notes(out, "rows"))
            digest = _verified(kind, options, out, report) if verify else ""
            write_atomic(out / "README.md", card.of_export(source, data, kind, rows).encode())
            made = {"fingerprint": fingerprint, "format": format, "rows": rows, "text": options.text}
            made |= {"data": data.fingerprint(), "verified": digest}
            write_atomic(out / MADE, (json.dumps(made, indent=2) + "\n").encode())
        shutil.rmtree(out / NOTES, ignore_errors=True)  # a killed process may have left them
        made = read_json(out / MADE)
    return {"out": str(out), "format": format, "rows": made["rows"], "verified": bool(made["verified"])}


def check(out: Path) -> int:
    """Reads a finished export again and compares its rows with the verified ones. Returns their number.

    Raises UserError if something differs, or if the export was not verified.
    """
    made = read_json(out / MADE)
    if not made.get("verified"):
        raise UserError("trace_invalid", f"{out}: exported with --no-verify, so it has no hashes; export it again")
    kind, options = find(made["format"]), Options(text=made["text"])
    digests: dict[str, str] = {}
    for number, entry in enumerate(kind.open(str(out), options).entries(0)):
        row = pair(entry.load(), number, options.task)
        digests[row["id"]] = _digest(row, kind, options)
    if len(digests) != made["rows"] or _whole(digests) != made["verified"]:
        raise UserError(
            "file_damaged", f"{out}: its rows differ from the exported ones; export again to another folder"
        )
    return len(digests)


def _check_free(out: Path, fingerprint: str) -> None:
    made = next((path for path in (out / MADE, out / NOTES / "job.json") if path.is_file()), None)
    if made is None:
        check_free(out)
    elif read_json(made).get("fingerprint") != fingerprint:
        raise UsageError("output_exists", f"{out} has an export of another format or other data; choose another folder")


def _rows(data: Pairs, options: Options, shard: int, start: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, complete row) of a shard's accepted pairs; `start` is the number of its first row."""
    for number, row in enumerate(data.read_shard(shard), start):
        if row.get("kept", True):
            try:
                whole = pair(row, number, options.task, decode=False)
            except UserError as error:
                raise UserError(error.code, f"{data.url}, row {number} ({row.get('id', '')}): {error}") from error
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
                # A file system that ignores case would let one name overwrite the other.
                if name.lower() in names:
                    message = f"{data.url} has two rows with the id {row['id']}; ids must differ"
                    raise UserError("output_collision", message)
                names.add(name.lower())
            records = kind.write(out, place, len(shards), rows, options)
            noted = [[name, row["id"] if kind.whole else name, _digest(row, kind, options)] for name, row in rows]
            write_atomic(note, json.dumps({"rows": noted, "records": records}, ensure_ascii=False).encode())
        start += data.rows_in(shard)
        if report:
            report(start, total, "written")
    if kind.finish:
        kind.finish(out, _notes(out, "records"), options)


def _notes(out: Path, key: str) -> Iterator[Any]:
    for note in sorted((out / NOTES).glob("[0-9]*.json")):
        yield from read_json(note)[key]


def _verified(kind: Format, options: Options, out: Path, report: Report | None) -> str:
    """sha256 of all rows, after each was read back and compared with its note."""
    wanted = {id: digest for _, id, digest in _notes(out, "rows")}
    total = len(wanted)
    whole = _whole(wanted)
    # By id, because folders list their files by name.
    for number, entry in enumerate(kind.open(str(out), options).entries(0)):
        row = pair(entry.load(), number, options.task)
        if wanted.pop(row["id"], None) != _digest(row, kind, options):
            message = f"{out}, {entry.where}: differs from what was written; check the disk"
            raise UserError("file_damaged", message)
        if report and number % 64 == 0:
            report(min(number, total), total, "verified")
    if wanted:
        raise UserError("file_damaged", f"{out}: {len(wanted)} rows cannot be read back, first {next(iter(wanted))}")
    return whole


def _whole(digests: dict[str, str]) -> str:
    """One hash of all rows' hashes, independent of their order."""
    return sha256("".join(digests[id] for id in sorted(digests)))


def _digest(row: dict[str, Any], kind: Format, options: Options) -> str:
    """Hash of what the format stores of a row: everything, or the images and the text."""
    digest = hashlib.sha256()
    for side in SIDES:
        digest.update(hashlib.sha256(row[side]["bytes"]).digest())
    stored = columns_of(row) if kind.whole else {"text": text_of(row, options.text)}
    return digest.hexdigest() + sha256_json(stored)
