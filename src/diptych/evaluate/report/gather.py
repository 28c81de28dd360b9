"""Reads a run folder for the report. Parts that are missing are None or empty, not errors."""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data import places
from diptych.data.images import open_image
from diptych.data.scan import selected
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.evaluate.results import find_json
from diptych.utils.documents import parse_json
from diptych.utils.paths import place

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.recipe.schema import Recipe

NUMBERS = ("id", "kept", "reason", "similarity", "copy_distance", "seam", "reference_panel", "target_panel")
SEARCHED = 4  # shards to search for examples


class Run:
    """A run folder, read when a part is needed."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = place(folder)

    def data(self, name: str) -> Dataset:
        """The dataset in a folder of the run."""
        return Dataset(self.folder / name)

    def rows(self, name: str) -> int | None:
        """Rows of a dataset; None if it is missing or unreadable. The stage's section of the page gives the reason."""
        data = self.data(name)
        try:
            return len(data) if data.shards() else None
        except UserError:
            return None

    def first(self, name: str, count: int) -> list[dict[str, Any]]:
        """The first rows of a dataset."""
        return list(islice(self.data(name), count))

    @cached_property
    def candidates(self) -> list[dict[str, Any]]:
        """Every candidate's numbers, without its images. A pair that repeats an earlier one counts as rejected."""
        return [
            dict(zip(NUMBERS, values, strict=True))
            for batch in selected(self.folder, *NUMBERS)
            for values in zip(*(batch[name] for name in NUMBERS), strict=True)
        ]

    def examples(self, reason: str, count: int) -> list[dict[str, Any]]:
        """Whole candidates of one verdict, one of each grid, evenly spaced over the first shards."""
        examples = []
        data = self.data("candidates")
        # One of the two orders of a grid's panels is enough.
        of_reason = {
            row["id"]
            for row in self.candidates
            if row["reason"] == reason and row["reference_panel"] < row["target_panel"]
        }
        for shard in data.shards()[:SEARCHED]:
            rows = (row for row in data.read_shard(shard) if row["id"] in of_reason)
            examples += [{**row, "kept": reason == "kept", "reason": reason} for row in rows]
        step = max(1, len(examples) // count)
        return examples[::step][:count]

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
        return self.json("student/training/summary.json").get("summary", {})

    @cached_property
    def sheets(self) -> list[tuple[int, Image]]:
        """The sample sheets of the training, and their steps."""
        found = (self.folder / "student" / "training" / "samples").glob("step-*.png")
        steps = {path: path.stem.removeprefix("step-") for path in sorted(found)}
        return [(int(step), open_image(path)) for path, step in steps.items() if step.isdecimal()]

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of `report/metrics.json`."""
        return self.json("report/metrics.json")

    @cached_property
    def scores(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Lines of `samples/scores.jsonl` by method and id."""
        lines = _lines(self.folder / "samples" / "scores.jsonl")
        return {(line["method"], line["id"]): line for line in lines if "method" in line and "id" in line}

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of the run; empty if it cannot be read."""
        return find_json(self.folder / name) or {}

    def images(self, method: str, ids: set[str]) -> dict[str, dict[str, Any]]:
        """Rows of `samples/METHOD` by id."""
        data = self.data(f"samples/{method}")
        return {row["id"]: row for row in data if row["id"] in ids} if data.shards() else {}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, over all starts of the run."""
        return places.seconds(self.folder)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run in its log, with machine and versions."""
        return [event for event in places.read(self.folder) if event.get("event") == "start"]


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file, without incomplete ones."""
    values = []
    for line in path.read_text("utf8", errors="replace").splitlines() if path.is_file() else []:
        try:
            values.append(parse_json(line))
        except ValueError:
            continue
    return [value for value in values if isinstance(value, dict)]
