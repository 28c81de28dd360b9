"""What a run of the same recipe has measured already: its rates are better than any assumption.

A run's log holds each stage's seconds and rows; its folders hold bytes; its candidates hold the tokens of each answer.
A rate counts where the recipe agrees in every key that it depends on; how many grids or steps are asked for is no such
key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import log
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe

OPEN = (
    "device",
    "threads",
    "paint.dtype",
    "paint.memory",
    "distill.precision",
)  # `auto` and null agree with what a run has settled
_PICTURES = ("teacher", "task", "write.layout", "paint.")
_PAIRS = (*_PICTURES, "write.writer", "write.grammar", "write.captions", "curate.judge", "curate.vlm")
_PAIRS += ("curate.screens", "curate.copies", "curate.duplicates")
DEPENDS: dict[str, tuple[str, ...]] = {
    "seconds_per_grid": (*_PICTURES, "device", "threads"),
    "seconds_per_step": ("teacher", "paint.panel_size", "distill.", "device", "threads"),
    "grid_bytes": _PICTURES,
    "candidate_bytes": (*_PAIRS, "curate.format"),
    "keep_rate": (*_PAIRS, "curate.thresholds."),
    "judge_input_tokens": ("task", "paint.panel_size", "curate.vlm"),
    "judge_answer_tokens": ("task", "paint.panel_size", "curate.vlm"),
}
HARMLESS = ("distill.steps", "distill.keep", "distill.checkpoint_every")  # no rate of a step depends on them
MOST_ROWS = 2000  # candidates whose evidence is read


@dataclass(frozen=True)
class Measured:
    """A rate, and the run it is of."""

    value: float
    source: str


def rates(recipe: Recipe, run_dir: str | Path) -> dict[str, Measured]:
    """The names of `DEPENDS` that the run folder has a value for; none if it is no run's folder."""
    folder = Path(run_dir)
    if not (folder / "recipe.yaml").is_file():
        return {}
    recipe, frozen = tasks.resolve(recipe), tasks.resolve(recipes.load(folder / "recipe.yaml"))
    events = log.read(folder)
    machines = [event["machine"] for event in events if event.get("event") == "start" and "machine" in event]
    machine = f" on {machines[-1].get('processor', '?')}, {machines[-1].get('cores', '?')} cores" if machines else ""
    source = f"in {folder}{machine}"
    found = _logged([event for event in events if event.get("event") == "stage"], folder, frozen.paint.images)
    if recipe.curate.vlm is not None:
        found |= _tokens(folder)
    return {name: Measured(value, source) for name, value in found.items() if agree(recipe, frozen, DEPENDS[name])}


def agree(mine: Recipe, theirs: Recipe, keys: tuple[str, ...]) -> bool:
    """Whether two recipes say the same of these keys (`"paint."` is all of that section)."""
    one, two = mine.flat(), theirs.flat()
    for key in one.keys() | two.keys():
        if key in HARMLESS or one.get(key) == two.get(key):
            continue
        if key in OPEN and one.get(key) in ("auto", None):
            continue
        if any(key == wanted or key.startswith(wanted if wanted[-1] == "." else f"{wanted}.") for wanted in keys):
            return False
    return True


def _logged(stages: list[dict[str, Any]], folder: Path, images: int) -> dict[str, float]:
    """Rates from the log's stages; `images` were drawn of each prompt."""
    found: dict[str, float] = {}
    last = {event["stage"]: event["result"] for event in stages}
    painted = [event for event in stages if event["stage"] == "paint"]
    processed = images * sum(event["result"].get("processed", 0) for event in painted)
    if processed:
        found["seconds_per_grid"] = sum(event["seconds"] for event in painted) / processed
    if rows := last.get("paint", {}).get("rows"):
        found["grid_bytes"] = _bytes(folder / "grids") / rows
    curated = last.get("curate", {})
    if rows := curated.get("rows"):
        found["candidate_bytes"] = _bytes(folder / "candidates") / rows
        if "pairs" in curated:
            found["keep_rate"] = curated["pairs"] / rows
    training = last.get("distill", {}).get("training", {})
    if training.get("steps") and training.get("seconds"):
        found["seconds_per_step"] = training["seconds"] / training["steps"]
    return {name: value for name, value in found.items() if value}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("part-*.parquet"))


def _tokens(folder: Path) -> dict[str, float]:
    """Mean tokens in and out of a vote, over the first candidates that were asked about."""
    from diptych.data.scan import batches
    from diptych.data.store import Dataset

    spent: list[list[int]] = []
    seen = 0
    for _, _, batch in batches(Dataset(folder / "candidates"), "evidence"):
        for text in batch["evidence"]:
            votes = json.loads(text).get("vlm", {}).get("votes", [])
            spent += [vote["tokens"] for vote in votes if vote["status"] == "answered" and any(vote["tokens"])]
        seen += len(batch["evidence"])
        if seen >= MOST_ROWS:
            break
    if not spent:
        return {}
    means = [sum(column) / len(spent) for column in zip(*spent, strict=True)]
    return {"judge_input_tokens": means[0], "judge_answer_tokens": means[1]}
