"""What a run folder holds, as the report reads it. What is not there is None or empty, never an error."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data import places
from diptych.data.images import open_image
from diptych.data.scan import selected
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.utils.documents import parse_json
from diptych.utils.paths import place, refuse_special

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.recipe.schema import Recipe

SMALL = ("id", "kept", "reason", "similarity", "copy_distance", "seam", "reference_panel", "target_panel")
LOOKED = 4  # shards looked through for pictures


class Run:
    """A run folder, read when asked."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = place(folder)

    def data(self, name: str) -> Dataset:
        return Dataset(self.folder / name)

    def rows(self, name: str) -> int | None:
        """Rows of a data set, None if it is not there or not readable (the stage's own part of the page says why)."""
        data = self.data(name)
        try:
            return len(data) if data.shards() else None
        except UserError:
            return None

    def first(self, name: str, count: int) -> list[dict[str, Any]]:
        """The first rows of a data set."""
        found: list[dict[str, Any]] = []
        for row in self.data(name):
            found.append(row)
            if len(found) == count:
                break
        return found

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        """Every candidate's numbers, without its pictures; a pair that repeats an earlier one is not kept."""
        return [
            dict(zip(SMALL, values, strict=True))
            for batch in selected(self.folder, *SMALL)
            for values in zip(*(batch[name] for name in SMALL), strict=True)
        ]

    def examples(self, reason: str, count: int) -> list[dict[str, Any]]:
        """Whole candidates of one verdict, one of each grid, spread over the first shards."""
        found = []
        data = self.data("candidates")
        of_reason = {row["id"] for row in self.candidates if row["reason"] == reason}
        for shard in data.shards()[:LOOKED]:
            rows = (row for row in data.read_shard(shard) if row["id"] in of_reason)
            found += [{**r, "kept": reason == "kept", "reason": reason} for r in rows if _in_order(r)]
        step = max(1, len(found) // count)
        return found[::step][:count]

    @cached_property
    def failures(self) -> dict[str, int]:
        """Failed rows by stage."""
        root = self.folder / "failed"
        folders = sorted({part.parent for part in root.rglob("part-*.parquet")}) if root.is_dir() else []
        return {str(f.relative_to(root)): len(Dataset(f)) for f in folders}

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """Lines of the training log."""
        return [line for line in _lines(self.folder / "student" / "training" / "metrics.jsonl") if "step" in line]

    @cached_property
    def trained(self) -> dict[str, Any]:
        """The training's summary."""
        return (_json(self.folder / "student" / "training" / "summary.json") or {}).get("summary", {})

    @cached_property
    def sheet(self) -> tuple[str, Image] | None:
        """The last sample sheet, and its name."""
        sheets = sorted((self.folder / "student" / "training" / "samples").glob("step-*.png"))
        return (sheets[-1].stem, open_image(sheets[-1])) if sheets else None

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """`report/metrics.json`."""
        return _json(self.folder / "report" / "metrics.json") or {}

    @cached_property
    def scores(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Lines of `samples/scores.jsonl` by method and id."""
        lines = _lines(self.folder / "samples" / "scores.jsonl")
        return {(line["method"], line["id"]): line for line in lines if "method" in line and "id" in line}

    def pictures(self, method: str, ids: set[str]) -> dict[str, dict[str, Any]]:
        """Rows of `samples/METHOD` by id."""
        data = self.data(f"samples/{method}")
        return {row["id"]: row for row in data if row["id"] in ids} if data.shards() else {}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, all sittings together."""
        return places.seconds(self.folder)

    @cached_property
    def start(self) -> dict[str, Any]:
        """The log's last start: machine and versions."""
        starts = [event for event in places.read(self.folder) if event.get("event") == "start"]
        return starts[-1] if starts else {}

    @cached_property
    def sittings(self) -> int:
        """How often the run was started."""
        return sum(event.get("event") == "start" for event in places.read(self.folder))


def _in_order(row: dict[str, Any]) -> bool:
    """Of the two orders of two panels, the first."""
    return row["reference_panel"] < row["target_panel"]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = parse_json(refuse_special(path).read_text("utf8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; one that a kill cut short is left out."""
    found = []
    for line in path.read_text("utf8", errors="replace").splitlines() if path.is_file() else []:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
