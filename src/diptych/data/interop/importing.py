"""`diptych data import`: a data set of another format becomes a folder of pairs for training.

Parts of `SHARD` rows are published whole, the manifest last, so that an interrupted import resumes with what is
missing. A row that is not a pair stops the import with its number and the reason, or, with `skip`, is listed in
OUT/failed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.data import records
from diptych.data.interop import card, find
from diptych.data.interop.rows import Options
from diptych.data.pairs import pair
from diptych.data.places import lock
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.utils.console import Report
from diptych.utils.io import sha256_json, write_atomic

SHARD = 256  # source rows per part
VERSION = 2  # increase it when the rows made from equal inputs change
NAME = "import"


def import_data(
    source: str,
    out: str | Path,
    format: str,
    options: Options | None = None,
    *,
    skip: bool = False,
    license: str = "",
    report: Report | None = None,
) -> dict[str, Any]:
    """Imports `source` into the folder `out`. Returns counts.

    Raises UsageError for an unknown format or column, or a folder that has other files; UserError for a source that
    cannot be read, and, unless `skip`, for the first row that is not a pair, with its number from 0 and the reason.
    """
    options = options or Options()
    kind = find(format)
    out = Path(out)
    check_folder(out)
    reader = kind.open(source, options)
    settings = [sorted(options.columns.items()), options.text, options.split, options.task, skip]
    fingerprint = sha256_json([NAME, VERSION, format, reader.fingerprint(), *settings])
    target = Dataset(out, records.schema(records.PAIR))
    failed = Dataset(out / "failed" / NAME, records.schema(records.FAILED))
    if not target.shards():
        check_free(out, "failed")
    with lock(out):
        target.clean()
        done = target.shards_done(fingerprint)
        if not target.is_complete(fingerprint):
            _read(reader, kind.name, options, target, failed, done, fingerprint, skip, report)
            if not len(target):
                raise UserError("run_empty", f"{source}: it has no pairs")
            manifest = {
                "fingerprint": fingerprint,
                "imported": {"format": format, "name": Path(source.rstrip("/")).name, "rows": len(reader)},
                "task": options.task,
                "license": license or "unknown",
            }
            failed.publish({"stage": NAME})
            target.publish(manifest)
        if not (out / "README.md").is_file():
            write_atomic(out / "README.md", card.of_import(target).encode())
        if report:
            report(len(reader), len(reader))
    return {"out": str(out), "format": format, "rows": len(target), "failed": len(failed), "continued": bool(done)}


def check_folder(out: Path) -> None:
    """UsageError if `out` is a file."""
    if out.exists() and not out.is_dir():
        raise UsageError("path_wrong_kind", f"{out} is a file; pass a folder")


def check_free(out: Path, *allowed: str) -> None:
    """UsageError if a folder has files that an interrupted import or export did not leave."""
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    others = [name for name in names if name not in (".lock", *allowed) and not name.endswith(".tmp")]
    if others:
        raise UsageError("output_exists", f"{out} already has other files ({others[0]}); choose another folder")


def _read(
    reader: Any,
    format: str,
    options: Options,
    target: Dataset,
    failed: Dataset,
    done: set[int],
    fingerprint: str,
    skip: bool,
    report: Report | None,
) -> None:
    total = len(reader)
    shards = range((total + SHARD - 1) // SHARD)
    first = next((shard for shard in shards if shard not in done), len(shards))
    seen = {row["id"]: "an earlier part" for row in target.columns("id")} if done else {}
    entries = reader.entries(first * SHARD)
    for shard in range(first, len(shards)):
        rows: list[dict[str, Any]] = []
        lost: list[dict[str, Any]] = []
        for number in range(shard * SHARD, min(total, (shard + 1) * SHARD)):
            entry = next(entries)
            try:
                row = pair(entry.load(), number, options.task)
                if row["id"] in seen:
                    raise UserError("row_invalid", f"its id {row['id']} is already that of {seen[row['id']]}")
            except UserError as error:
                if isinstance(error, UsageError):
                    raise
                reason = f"{format} row {number} ({entry.where}): {error}"
                if not skip:
                    raise UserError(error.code, f"{reason}. Pass --skip to list such rows and continue") from error
                lost.append({"stage": NAME, "id": f"row-{number:06d}", "reason": reason, "row": "{}"})
                continue
            seen[row["id"]] = f"row {number}"
            rows.append(row)
        if lost:
            failed.write_shard(shard, lost, fingerprint)
        else:
            failed.drop_shard(shard)
        target.write_shard(shard, rows, fingerprint)
        if report:
            report(min(total, (shard + 1) * SHARD), total)
