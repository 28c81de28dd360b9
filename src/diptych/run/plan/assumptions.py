"""Assumptions of a plan, each with its value, its unit and its source (`assumptions.yaml`).

`--assume NAME=VALUE` sets one. Rates that a run of the same recipe measured replace defaults, but not values that are
set. Prices have no default, and a plan without a price lists it as missing.

A run's log has the seconds and rows of each stage, its folders have the bytes, and its candidates the tokens of each
answer. A measured rate applies if the recipe agrees in every key that the rate depends on. The number of grids or steps
is not such a key.
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
    """A device for a plan.

    `tflops` is the speed of its matrix products, 10^12 operations a second, in bfloat16 on a GPU. `paint_share` and
    `train_share` are the shares of it that painting and training reach. `memory` is in bytes; None means unknown.
    """

    tflops: float
    memory: float | None
    source: str
    paint_share: float
    train_share: float


@dataclass(frozen=True)
class Assumption:
    """An assumption. `value` None means unknown, and `low` and `high` are the range of published values."""

    value: float | None
    unit: str
    source: str
    low: float | None = None
    high: float | None = None
    of: str = "default"  # or "set", "measured", "recipe": where the value comes from

    def values(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        shown = {"value": self.value, "unit": self.unit, "of": self.of, "source": self.source}
        return shown | ({"low": self.low, "high": self.high} if self.low is not None else {})


# `auto` and null agree with the resolved values of a run.
AUTO = ("device", "threads", "paint.dtype", "paint.memory", "distill.precision")
_IMAGES = ("teacher", "task", "write.layout", "paint.")
_PAIRS = (*_IMAGES, "write.writer", "write.grammar", "write.captions", "curate.judge", "curate.vlm")
_PAIRS += ("curate.screens", "curate.copies", "curate.duplicates")
DEPENDS: dict[str, tuple[str, ...]] = {
    "seconds_per_grid": (*_IMAGES, "device", "threads"),
    "seconds_per_step": ("teacher", "paint.panel_size", "distill.", "device", "threads"),
    "grid_bytes": _IMAGES,
    "candidate_bytes": (*_PAIRS, "curate.format"),
    "keep_rate": (*_PAIRS, "curate.thresholds."),
    "judge_input_tokens": ("task", "paint.panel_size", "curate.vlm"),
    "judge_answer_tokens": ("task", "paint.panel_size", "curate.vlm"),
}
HARMLESS = ("distill.steps", "distill.keep", "distill.checkpoint_every")  # the seconds of a step do not depend on them
MAX_ROWS = 2000  # candidates whose evidence is read


@cache
def _table() -> dict[str, Any]:
    return parse_yaml(read_text(FILE), str(FILE))


def devices() -> dict[str, Device]:
    """Return the known devices by name."""
    return {name: Device(**of) for name, of in _table()["devices"].items()}


def defaults(recipe: Recipe, gpu: str | None = None) -> dict[str, Assumption]:
    """Return every assumption by name, for a recipe and a device. Raises UsageError for an unknown device."""
    name, table = device_name(recipe, gpu), _table()
    device, sources = devices()[name], table["shares"]["cpu" if name == "cpu" else "gpu"]
    values = table["assumptions"] | (table["pocket"] if recipe.teacher == "pocket" else {})
    known = {key: Assumption(**one) for key, one in values.items()}
    painting = {"value": device.paint_share, "source": sources["paint_share"]}
    if recipe.paint.speed is not None and name != "cpu":
        painting = table["shares"]["compiled"]
    known["tflops"] = replace(known["tflops"], value=device.tflops, source=device.source)
    known["paint_share"] = replace(known["paint_share"], **painting)
    known["train_share"] = replace(known["train_share"], value=device.train_share, source=sources["train_share"])
    gib = device.memory and round(device.memory / 2**30, 1)
    known["device_gib"] = replace(known["device_gib"], value=gib)
    return known


def device_name(recipe: Recipe, gpu: str | None = None) -> str:
    """Return the device of a plan: `gpu`, in any case of its letters, else a CPU for the pocket world and an H200 for
    other teachers, unless the recipe's `device` says otherwise. Raises UsageError for an unknown device."""
    if gpu is None:
        small = recipe.device == "cpu" or (recipe.device == "auto" and recipe.teacher == "pocket")
        return "cpu" if small else "H200"
    known = {name.lower(): name for name in devices()}
    if gpu.lower() not in known:
        raise UsageError(
            "hardware_unknown",
            f"--gpu {gpu}: the speed of this device is not known. For a device that is not in this list, pass --assume "
            f"tflops=… and --assume device_gib=…. Known: {', '.join(devices())}{nearest(gpu, devices())}",
        )
    return known[gpu.lower()]


def collect(recipe: Recipe, sets: Sequence[str] = (), gpu: str | None = None) -> dict[str, Assumption]:
    """Return the defaults with `sets` (`"keep_rate=0.4"`) applied. Raises UsageError for an invalid name or value."""
    known = defaults(recipe, gpu)
    if gpu is not None:
        known |= {name: replace(known[name], of="set") for name in ("tflops", "device_gib")}
    for text in sets:
        name, value = parse(text, known)
        known[name] = replace(known[name], value=value, low=None, high=None, of="set", source="--assume")
    vlm = recipe.curate.vlm
    for role, endpoint in (("writer", recipe.write.endpoint), ("vlm", vlm.endpoint if vlm else None)):
        for way in ("input", "output"):
            price = getattr(endpoint, f"{way}_price", None)
            name = f"{role}_{way}_price"
            if price is not None and known[name].of == "default":
                known[name] = replace(known[name], value=price, of="recipe", source=f"endpoint.{way}_price")
    return known


def parse(text: str, known: Mapping[str, Assumption]) -> tuple[str, float]:
    """Parse `"keep_rate=0.4"` into ("keep_rate", 0.4). Raises UsageError for an invalid name or value."""
    name, equals, given = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise _invalid(text, "write it as name=number, for instance --assume keep_rate=0.4")
    if name not in known:
        hint = nearest(name, known) or f"; known: {', '.join(known)}"
        raise UsageError("name_unknown", f"--assume {text}: unknown assumption{hint}")
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    priced = name.endswith("_price") or name == "gpu_hour"
    if not math.isfinite(value) or value < 0 or (value == 0 and not (priced or name in SHARES)):
        raise _invalid(text, f"the value ({known[name].unit}) must be a number above 0")
    if name in SHARES and value > 1:
        raise _invalid(text, "a share is at most 1")
    if name == "devices" and value != int(value):
        raise _invalid(text, "the number of devices must be a whole number")
    if name in ("paint_share", "train_share") and value == 0:
        raise _invalid(text, "the value must be above 0")
    return name, value


def _invalid(text: str, why: str) -> UsageError:
    return UsageError("option_invalid", f"--assume {text}: {why}.")


def rates(recipe: Recipe, run_dir: str | Path) -> dict[str, tuple[float, str]]:
    """Return the rates of `DEPENDS` that a run folder has, each with its source; none if it is not a run."""
    folder = Path(run_dir)
    if not (folder / "recipe.yaml").is_file():
        return {}
    recipe, frozen = tasks.resolve(recipe), tasks.resolve(recipes.load(folder / "recipe.yaml"))
    events = places.read(folder)
    machines = [event["machine"] for event in events if event.get("event") == "start" and "machine" in event]
    machine = f" on {machines[-1].get('processor', '?')}, {machines[-1].get('cores', '?')} cores" if machines else ""
    source = f"in {folder}{machine}"
    values = _logged([event for event in events if event.get("event") == "stage"], folder, frozen.paint.images)
    if recipe.curate.vlm is not None:
        values |= _tokens(folder)
    return {name: (value, source) for name, value in values.items() if agree(recipe, frozen, DEPENDS[name])}


def agree(mine: Recipe, theirs: Recipe, keys: tuple[str, ...]) -> bool:
    """Whether two recipes have the same values of these keys (`"paint."` is the whole section)."""
    one, two = mine.flat(), theirs.flat()
    for key in one.keys() | two.keys():
        if key in HARMLESS or one.get(key) == two.get(key):
            continue
        if key in AUTO and one.get(key) in ("auto", None):
            continue
        if any(key == wanted or key.startswith(wanted if wanted[-1] == "." else f"{wanted}.") for wanted in keys):
            return False
    return True


def _logged(stages: list[dict[str, Any]], folder: Path, images: int) -> dict[str, float]:
    """Return the rates from the stages of the log, with `images` grids a prompt."""
    values: dict[str, float] = {}
    last = {event["stage"]: event["result"] for event in stages}
    painted = [event for event in stages if event["stage"] == "paint"]
    processed = images * sum(event["result"].get("processed", 0) for event in painted)
    if processed:
        values["seconds_per_grid"] = sum(event["seconds"] for event in painted) / processed
    if rows := last.get("paint", {}).get("rows"):
        values["grid_bytes"] = _bytes(folder / "grids") / rows
    curated = last.get("curate", {})
    if rows := curated.get("rows"):
        values["candidate_bytes"] = _bytes(folder / "candidates") / rows
        if "pairs" in curated:
            values["keep_rate"] = curated["pairs"] / rows
    training = last.get("distill", {}).get("training", {})
    if training.get("steps") and training.get("seconds"):
        values["seconds_per_step"] = training["seconds"] / training["steps"]
    return {name: value for name, value in values.items() if value}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("part-*.parquet"))


def _tokens(folder: Path) -> dict[str, float]:
    """Return the mean input and output tokens of a vote, from the first candidates that were judged."""
    from diptych.data.scan import batches
    from diptych.data.store import Dataset

    spent: list[list[int]] = []
    seen = 0
    for _, _, batch in batches(Dataset(folder / "candidates"), "evidence"):
        for text in batch["evidence"]:
            votes = json.loads(text).get("vlm", {}).get("votes", [])
            spent += [vote["tokens"] for vote in votes if vote["status"] == "answered" and any(vote["tokens"])]
        seen += len(batch["evidence"])
        if seen >= MAX_ROWS:
            break
    if not spent:
        return {}
    means = [sum(column) / len(spent) for column in zip(*spent, strict=True)]
    return {"judge_input_tokens": means[0], "judge_answer_tokens": means[1]}


@dataclass
class Book:
    """The assumptions, and which of them a plan uses."""

    known: dict[str, Assumption]
    used: dict[str, Assumption] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        value = self.maybe(name)
        assert value is not None, name
        return value

    def maybe(self, name: str) -> float | None:
        """Return an assumption that may have no value."""
        self.used[name] = self.known[name]
        return self.known[name].value

    def derived(self, name: str, value: float) -> float:
        """Return an assumption, or `value`, which follows from others, if it is not set or measured."""
        one = self.known[name]
        self.used[name] = one = replace(one, value=value) if one.value is None else one
        assert one.value is not None
        return one.value

    def measure(self, rates: Mapping[str, tuple[float, str]]) -> None:
        """Replace defaults by measured rates."""
        for name, (value, source) in rates.items():
            if (known := self.known[name]).of == "default":
                self.known[name] = replace(known, value=value, source=source, low=None, high=None, of="measured")

    def was_set(self, *names: str) -> bool:
        """Whether one of these assumptions is set."""
        return any(self.known[name].of == "set" for name in names)
