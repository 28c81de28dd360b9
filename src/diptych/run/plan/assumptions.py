"""What a plan cannot count and has to assume: each with its value, its unit and where it comes from
(`assumptions.yaml`).

`--assume NAME=VALUE` sets one. What a run of the same recipe measured replaces a default, never what somebody set.
Prices have no default: a plan with no price says so instead of guessing one.

A run's log holds each stage's seconds and rows; its folders hold bytes; its candidates hold the tokens of each answer.
A measured rate counts where the recipe agrees in every key that it depends on; how many grids or steps are asked for is
no such key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from diptych import recipe as recipes
from diptych.data import places
from diptych.errors import UsageError, nearest
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.utils.documents import parse_yaml, read_text

FILE = Path(__file__).with_suffix(".yaml")
SHARES = ("keep_rate", "judge_share", "local_vlm_share", "paint_share", "train_share")


@dataclass(frozen=True)
class Device:
    """What a plan may run on. `tflops`: what its matrix products reach, 10^12 a second, in bfloat16 on a GPU.

    `paint_share` and `train_share`: how much of that drawing and training reach. `memory` in bytes; None: not known.
    """

    tflops: float
    memory: float | None
    source: str
    paint_share: float
    train_share: float


@dataclass(frozen=True)
class Assumption:
    """One of them. `value` None: nobody said. `low` and `high` bound what is published, `of` says who set it."""

    value: float | None
    unit: str
    source: str
    low: float | None = None
    high: float | None = None
    of: str = "default"  # or "set", or "measured"

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        shown = {"value": self.value, "unit": self.unit, "of": self.of, "source": self.source}
        return shown | ({"low": self.low, "high": self.high} if self.low is not None else {})


# `auto` and null agree with what a run has settled.
OPEN = ("device", "threads", "paint.dtype", "paint.memory", "distill.precision")
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


@cache
def _table() -> dict[str, Any]:
    return parse_yaml(read_text(FILE), str(FILE))


def devices() -> dict[str, Device]:
    """What a plan may run on, by name."""
    return {name: Device(**of) for name, of in _table()["devices"].items()}


def defaults(recipe: Recipe, gpu: str | None = None) -> dict[str, Assumption]:
    """Every assumption by name, as far as the recipe and the device decide it. UsageError for an unknown device."""
    name, table = device_name(recipe, gpu), _table()
    device, sources = devices()[name], table["shares"]["cpu" if name == "cpu" else "gpu"]
    told = table["assumptions"] | (table["pocket"] if recipe.teacher == "pocket" else {})
    found = {key: Assumption(**one) for key, one in told.items()}
    painting = {"value": device.paint_share, "source": sources["paint_share"]}
    if recipe.paint.speed is not None and name != "cpu":
        painting = table["shares"]["compiled"]
    found["tflops"] = replace(found["tflops"], value=device.tflops, source=device.source)
    found["paint_share"] = replace(found["paint_share"], **painting)
    found["train_share"] = replace(found["train_share"], value=device.train_share, source=sources["train_share"])
    gib = device.memory and round(device.memory / 2**30, 1)
    found["device_gib"] = replace(found["device_gib"], value=gib)
    return found


def device_name(recipe: Recipe, gpu: str | None = None) -> str:
    """Where a plan takes a recipe to run: on `gpu` (in any case of its letters), else the pocket world, unless it says
    otherwise, on a CPU and the rest on an H200. UsageError for an unknown one."""
    if gpu is None:
        small = recipe.device == "cpu" or (recipe.device == "auto" and recipe.teacher == "pocket")
        return "cpu" if small else "H200"
    known = {name.lower(): name for name in devices()}
    if gpu.lower() not in known:
        raise UsageError(
            f"--gpu {gpu}: what it reaches is not known here; known: {', '.join(devices())}{nearest(gpu, devices())}; "
            "for any other say --assume tflops=… and --assume device_gib=…"
        )
    return known[gpu.lower()]


def collect(recipe: Recipe, sets: Sequence[str] = (), gpu: str | None = None) -> dict[str, Assumption]:
    """The defaults with `sets` (`"keep_rate=0.4"`) laid over. UsageError for a name or a value that makes no sense."""
    found = defaults(recipe, gpu)
    if gpu is not None:
        found |= {name: replace(found[name], of="set") for name in ("tflops", "device_gib")}
    for text in sets:
        name, value = parse(text, found)
        found[name] = replace(found[name], value=value, low=None, high=None, of="set", source="--assume")
    vlm = recipe.curate.vlm
    for role, endpoint in (("writer", recipe.write.endpoint), ("vlm", vlm.endpoint if vlm else None)):
        for way in ("input", "output"):
            price = getattr(endpoint, f"{way}_price", None)
            name = f"{role}_{way}_price"
            if price is not None and found[name].of == "default":
                found[name] = replace(found[name], value=price, of="recipe", source=f"endpoint.{way}_price")
    return found


def parse(text: str, known: Mapping[str, Assumption]) -> tuple[str, float]:
    """`"keep_rate=0.4"` as ("keep_rate", 0.4)."""
    name, equals, given = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise UsageError(f"--assume {text}: write it as name=number, for instance --assume keep_rate=0.4")
    if name not in known:
        hint = nearest(name, known) or f"; there are {', '.join(known)}"
        raise UsageError(f"--assume {text}: unknown assumption{hint}")
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    priced = name.endswith("_price") or name == "gpu_hour"
    if not math.isfinite(value) or value < 0 or (value == 0 and not (priced or name in SHARES)):
        raise UsageError(f"--assume {text}: {known[name].unit} must be a number above 0")
    if name in SHARES and value > 1:
        raise UsageError(f"--assume {text}: a share is at most 1")
    if name == "devices" and value != int(value):
        raise UsageError(f"--assume {text}: a whole number of devices")
    if name in ("paint_share", "train_share") and value == 0:
        raise UsageError(f"--assume {text}: nothing would ever be done")
    return name, value


@dataclass(frozen=True)
class Measured:
    """A rate, and the run it is of."""

    value: float
    source: str


def rates(recipe: Recipe, run_dir: str | Path) -> dict[str, Measured]:
    """The names of `DEPENDS` that the run folder has a value for; none if it is not a run's folder."""
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
