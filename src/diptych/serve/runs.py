"""The runs of one folder for the web app: pairs with their verdicts, stages, losses, sample sheets, reports.

A request names a run or a pair, never a file: the run must be listed, and the pair is looked up by its id.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diptych.data import labels, records, verdicts
from diptych.data.scan import row
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.train import metrics
from diptych.utils.paths import inside

SMALL = ("id", "subject", "caption", "similarity", "copy_distance", "seam", "kept", "reason")
SIDES = {"reference": "conditioning", "target": "image"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SAMPLES = "student/training/samples"
CACHED = 4  # runs whose tables stay in memory


class Runs:
    """The runs in a folder. Any thread may call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._tables: OrderedDict[str, tuple[Any, pa.Table]] = OrderedDict()

    def names(self) -> list[str]:
        """Returns the names of the runs, sorted."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(p.name for p in paths if NAME.fullmatch(p.name) and (p / "recipe.yaml").is_file())

    def of(self, name: str | None) -> Path:
        """Returns a run's folder. UsageError for an empty or unknown name."""
        if not name:
            raise UsageError("run_not_found", "run: choose a run first")
        if name not in self.names():
            raise UsageError("run_not_found", f"run: '{name[:64]}' is not one of the server's runs")
        run = self.folder / name
        # A run made by others may contain links, to show or to change other files of this machine.
        for path in run.iterdir():
            _inside(run, path.name)
        return run

    def at(self, name: str, path: str) -> Path:
        """Returns a file or folder of a run, existing or not. UserError for one that a link puts elsewhere."""
        return _inside(self.of(name), path)

    # ---- pairs

    def page(
        self, name: str, shown: str, subject: str, start: int, count: int
    ) -> tuple[list[dict[str, Any]], int, list[str]]:
        """Returns a page of candidate pairs, the number of matching pairs, and all reasons.

        `shown` is all, kept, refused, decided, or a reason; `subject` is a part of the subject's name.
        """
        table, decided = self._table(name), labels.both_ways(labels.decided(self.of(name)))
        reasons = sorted(set(table["reason"].to_pylist())) if len(table) else []
        mask = pc.match_substring(table["subject"], subject, ignore_case=True)
        if shown in ("kept", "refused"):
            mask = pc.and_(mask, pc.equal(table["kept"], shown == "kept"))
        elif shown == "decided":
            mask = pc.and_(mask, pc.is_in(table["id"], pa.array(list(decided), pa.string())))
        elif shown != "all":
            mask = pc.and_(mask, pc.equal(table["reason"], shown))
        matching = table.filter(mask)
        rows = matching.slice(max(0, start), count).to_pylist()
        return [{**pair, "decided": decided.get(pair["id"])} for pair in rows], len(matching), reasons

    def picture(self, name: str, id: str, side: str) -> bytes:
        """Returns the stored bytes of a pair's `reference` or `target`. UsageError for an unknown pair."""
        table = self._table(name)
        at = pc.index(table["id"], id).as_py()
        if at < 0 or side not in SIDES:
            raise UsageError("request_invalid", f"pair: '{id[:64]}' is not in this run")
        pair = table.slice(at, 1).to_pylist()[0]
        column = SIDES[side]
        data = Dataset(self.at(name, "candidates"))
        return row(data, pair["shard"], pair["number"], column)[column]["bytes"] or b""

    def decide(self, name: str, id: str, verdict: str, who: str) -> None:
        """Stores a person's verdict on a pair and its mirror: accept, reject, or judge to leave both to the judge."""
        if verdict not in labels.VERDICTS or pc.index(self._table(name)["id"], id).as_py() < 0:
            raise UsageError("request_invalid", f"pair: unknown pair '{id[:64]}' or verdict '{verdict[:16]}'")
        with self._lock:
            labels.add(self.of(name), id, verdict, who)

    def _table(self, name: str) -> pa.Table:
        """The candidates' small columns, with the shard and number of each row; cached until a part changes."""
        folder = self.at(name, "candidates")
        parts = [_inside(folder, path.name) for path in sorted(folder.glob("part-*.parquet"))]
        key = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
        with self._lock:
            known = self._tables.get(name)
            if known is not None and known[0] == key:
                return known[1]
        data, tables = Dataset(folder, records.schema(records.PAIR)), []
        for shard in data.shards():
            with data.open_part(shard) as part:
                table = part.read(columns=list(SMALL))
            reasons = [verdicts.reason_now(reason) for reason in table["reason"].to_pylist()]
            table = table.set_column(SMALL.index("reason"), "reason", pa.array(reasons, pa.string()))
            table = table.append_column("shard", pa.array([shard] * len(table), pa.int64()))
            tables.append(table.append_column("number", pa.array(range(len(table)), pa.int64())))
        if not tables:
            raise UserError("run_incomplete", f"The run '{name}' has no candidate pairs yet.")
        whole = pa.concat_tables(tables).replace_schema_metadata(None)
        with self._lock:
            self._tables[name] = (key, whole)
            while len(self._tables) > CACHED:
                self._tables.popitem(last=False)
        return whole

    # ---- progress of a run

    def stages(self, name: str) -> list[dict[str, Any]]:
        """Returns the rows of each stage, and whether it is complete."""
        folder, stages = self.of(name), []
        for stage in ("prompts", "grids", "candidates", "pairs"):
            data = Dataset(folder / stage)
            stages.append({"stage": stage, "rows": len(data), "complete": data.is_complete()})
        return stages

    def losses(self, name: str) -> list[tuple[int, float]]:
        """Returns (step, loss) of the student's training so far."""
        lines = metrics.read(self.at(name, "student/training/metrics.jsonl"))
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def sheets(self, name: str) -> list[Path]:
        """Returns the training's sample sheets, oldest first."""
        folder = self.at(name, SAMPLES)
        return [_inside(folder, path.name) for path in sorted(folder.glob("step-*.png"))]

    def report(self, name: str) -> Path | None:
        """Returns the run's report, None if it is not written yet."""
        path = self.at(name, "report/report.html")
        return path if path.is_file() else None


def _inside(folder: Path, path: str) -> Path:
    """`paths.inside` with an error that does not name other files of this machine to clients."""
    try:
        return inside(folder, path)
    except UserError as error:
        raise UserError(error.code, f"{path}: links and special files are not shown; replace it there") from None
