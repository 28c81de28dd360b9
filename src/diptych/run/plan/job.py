"""A recipe with everything that its cost depends on, and the book of what was assumed along the way."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import places
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.recipe.tasks import Grid, Task
from diptych.run.plan import arithmetic
from diptych.run.plan.assumptions import Assumption
from diptych.run.plan.teacher import Counts, Teacher


@dataclass
class Book:
    """The assumptions, and which of them a plan has used."""

    known: dict[str, Assumption]
    used: dict[str, Assumption] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        value = self.maybe(name)
        assert value is not None, name
        return value

    def maybe(self, name: str) -> float | None:
        """An assumption that may have no value."""
        self.used[name] = self.known[name]
        return self.known[name].value

    def derived(self, name: str, value: float) -> float:
        """An assumption, or, where nobody said or measured one, what follows from others."""
        one = self.known[name]
        self.used[name] = one = replace(one, value=value) if one.value is None else one
        assert one.value is not None
        return one.value

    def measure(self, found: Mapping[str, Measured]) -> None:
        """Measured values replace defaults."""
        for name, one in found.items():
            if self.known[name].of == "default":
                new = replace(self.known[name], value=one.value, source=one.source, low=None, high=None)
                self.known[name] = replace(new, of="measured")

    def was_set(self, *names: str) -> bool:
        """Whether somebody chose one of these."""
        return any(self.known[name].of == "set" for name in names)


@dataclass(frozen=True)
class Job:
    """A recipe with everything that its cost depends on."""

    recipe: Recipe
    task: Task
    teacher: Teacher
    counts: Counts
    book: Book
    on_cpu: bool

    @cached_property
    def layout(self) -> Grid:
        return self.task.layout(self.recipe.write.layout)

    @cached_property
    def size(self) -> int:
        """Pixels of a panel's side."""
        return self.teacher.panel(self.recipe.paint.panel_size)

    @property
    def grids(self) -> int:
        return self.recipe.write.count * self.recipe.paint.images

    @property
    def pairs(self) -> int:
        """Every two panels, in whichever order."""
        return self.grids * math.comb(self.layout.panels, 2)

    @property
    def candidates(self) -> int:
        return 2 * self.pairs

    @cached_property
    def kept(self) -> int:
        return round(self.candidates * self.book["keep_rate"])

    @property
    def text_flops(self) -> float:
        """Of one prompt through the text encoders."""
        return 2.0 * self.counts.text * self.teacher.text_tokens

    def number_bytes(self, asked: str) -> int:
        """Bytes of a number in a precision; `auto` is settled as the device decides."""
        return 4 if asked == "float32" or (asked == "auto" and self.on_cpu) else 2

    def canvas(self, rows: int, cols: int) -> arithmetic.Canvas:
        image = arithmetic.image_tokens(rows * self.size, cols * self.size, self.teacher.factor)
        return arithmetic.Canvas(image, self.teacher.text_tokens)

    def money(self, role: str, spent: dict[str, int]) -> float | None:
        """Of tokens in and out; None without both prices."""
        prices = [self.book.maybe(f"{role}_{way}_price") for way in ("input", "output")]
        if None in prices:
            return None
        return sum(n * (price or 0.0) for n, price in zip(spent.values(), prices, strict=True)) / 1e6

    def row_bytes(self, name: str, panels: int) -> float:
        """Bytes of a row with pictures of so many panels: as measured or set (`name`), else counted."""
        if self.book.known[name].value is not None:
            return self.book[name]
        return panels * self.size**2 * self.book["pixel_bytes"] + self.book["row_bytes"]

    def hours(self, seconds: str, times: int, flops: float, share: str) -> float:
        """Device hours of `times` pieces of work: by the seconds of one, measured or set, else by operations.

        Who chooses a device or its rate asks about that one, and not about where something was measured.
        """
        known = self.book.known[seconds]
        if known.of == "set" or (known.value is not None and not self.book.was_set("tflops", share)):
            return times * self.book[seconds] / 3600
        return arithmetic.hours(flops, self.book["tflops"], self.book[share])


# What a run of the same recipe has measured already: its rates are better than any assumption. A run's log holds each
# stage's seconds and rows; its folders hold bytes; its candidates hold the tokens of each answer. A rate counts where
# the recipe agrees in every key that it depends on; how many grids or steps are asked for is no such key.

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
    events = places.read(folder)
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
