"""What a row is, at each step of the way: arrow schemas, ids, seeds, and the rule that keeps a pair.

prompts → grids → candidates → pairs. A pair's columns start with those of the released data set
(`primecai/dsd_data`: `conditioning`, `image`, `caption`), so that its readers open ours.
Image columns are the Hugging Face `Image` struct `{bytes, path}`, and the schema metadata says so:
`datasets.load_dataset("parquet", …)` and the hub's viewer show pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from diptych.recipe import tasks

if TYPE_CHECKING:
    import pyarrow as pa

    from diptych.recipe.schema import Curate, Recipe

IMAGE = "image"

# Column name → type, in order. `image` is the struct, `list[string]` a list of strings; the rest are arrow's names.
PROMPT = {
    "id": "string",
    "prompt": "string",  # of the whole grid
    "panels": "list[string]",  # the caption of each panel, row by row
    "subject": "string",  # its kind, one word or a short phrase
    "task": "string",
    "seed": "int64",
}
GRID = {
    "id": "string",
    "image": IMAGE,
    "prompt_id": "string",
    "prompt": "string",
    "panels": "list[string]",
    "subject": "string",
    "task": "string",
    "seed": "int64",
    "rows": "int64",  # panels down
    "cols": "int64",  # panels across
    "panel_size": "int64",  # pixels
    "model": "string",  # fingerprint of the teacher
}
PAIR = {
    "conditioning": IMAGE,  # the reference panel
    "image": IMAGE,  # the target panel
    "caption": "string",  # of the target
    "instruction": "string",
    "id": "string",
    "grid_id": "string",
    "reference_caption": "string",
    "task": "string",
    "subject": "string",
    "reference_panel": "int64",
    "target_panel": "int64",
    "seed": "int64",
    "similarity": "float64",  # the judge's, higher = more surely the same subject
    "copy_distance": "float64",  # pixels after alignment, 0 = a copy
    "seam": "float64",  # strength of the seam the grid was cut at
    "kept": "bool",
    "reason": "string",  # "kept", or why not: the first test that failed
    "judge": "string",  # fingerprint
    "evidence": "string",  # JSON: everything else the verdict rests on
}
FAILED = {"stage": "string", "id": "string", "reason": "string", "row": "string"}

COLUMNS = {"prompts": PROMPT, "grids": GRID, "candidates": PAIR, "pairs": PAIR, "failed": FAILED}


def schema(columns: dict[str, str]) -> pa.Schema:
    """The arrow schema of a column table, with the metadata that lets `datasets` read images as images."""
    import pyarrow as pa

    types = {
        IMAGE: pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "list[string]": pa.list_(pa.string()),
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
    }
    features: dict[str, Any] = {}
    for name, kind in columns.items():
        if kind == IMAGE:
            features[name] = {"_type": "Image"}
        elif kind == "list[string]":
            features[name] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
        else:
            features[name] = {"dtype": kind, "_type": "Value"}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.schema([pa.field(name, types[kind]) for name, kind in columns.items()], metadata=metadata)


def prompt_id(index: int) -> str:
    """`p-000012`, the 13th prompt of a run."""
    return f"p-{index:06d}"


def grid_id(from_prompt: str, image: int = 0) -> str:
    """The grid of a prompt has its number: `p-000012` → `g-000012`, and its second image is `g-000012.1`."""
    return "g-" + from_prompt.partition("-")[2] + (f".{image}" if image else "")


def prompt_of(grid: str) -> str:
    """What all grids of one prompt have in common: `g-000012`, for its second image `g-000012.1` too."""
    return re.sub(r"(g-\d+)\.\d+$", r"\1", grid)


def pair_id(from_grid: str, reference: int, target: int) -> str:
    """An ordered pair of a grid's panels: `g-000012`, 0, 1 → `c-000012-01`."""
    return f"c-{from_grid.partition('-')[2]}-{reference}{target}"


def mirrors(pair: str) -> list[str]:
    """The id of the pair of the same two panels in the other order: `c-000012-01` → `c-000012-10`. A number of three
    digits can be read in two ways, and both are given."""
    head, _, panels = pair.rpartition("-")
    if not head or not panels.isdecimal() or len(panels) < 2:
        return []
    cuts = [len(panels) // 2] if len(panels) % 2 == 0 else [len(panels) // 2, len(panels) // 2 + 1]
    return [f"{head}-{panels[cut:]}{panels[:cut]}" for cut in cuts]


def seed_of(run_seed: int, row_id: str, purpose: str = "") -> int:
    """A row's own 63-bit seed, from the run's seed and the row's id, so that no order or batch changes it.

    `purpose` gives one row several independent seeds (its wording, its noise, …).
    """
    digest = hashlib.sha256(f"{run_seed}\0{row_id}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Thresholds(Protocol):
    """The part of a recipe that decides (`sections.Thresholds`)."""

    @property
    def same(self) -> float: ...
    @property
    def near_copy(self) -> float: ...
    @property
    def seam(self) -> float: ...


TESTS = ("seam", "near_copy", "same")  # thresholds, in the order in which they are applied
DIFFERENT = "different"  # the reason of a pair whose panels do not show the same subject: below the threshold `same`
SCREEN = "screen"  # the reason of a pair with a panel that a screen refuses is `screen: NAME`
COPY = "near_copy"  # … and of one whose panels are one picture by another test than pixels, `near_copy: hash`
COPY_TESTS = {"hash": "hash", "mirrored": "hash", "embedding": "embedding"}  # what is measured → its limit
UNASKED = "unasked"  # other limits let it through to a judge who was never asked about it
DUPLICATE = "duplicate"  # what the selection refuses has the reason `duplicate of ID: TEST`, in `failed/select/`
ACCEPTED, REJECTED = "accepted by hand", "rejected by hand"  # reasons in `pairs/` and `failed/select/`; see `decisions`

Limits = Mapping[str, Mapping[str, float]]  # of `recipe.Screens.limits`: name → {"least" or "most": number}


@dataclass(frozen=True)
class Bounds:
    """What decides besides the thresholds, where a recipe had it measured: the limits of its screens (`Screens.limits`)
    and of its tests of copies (`Copies.limits`). None: nothing was measured, and the evidence holds no numbers."""

    screens: Limits | None = None
    copies: Mapping[str, float] | None = None

    @classmethod
    def of(cls, curate: Curate) -> Bounds:
        """A recipe's."""
        screens, copies = curate.screens, curate.copies
        return cls(screens.limits() if screens else None, copies.limits() if copies else None)


NONE = Bounds()


def reason_now(stored: str) -> str:
    """A stored reason by its present name: rows of older versions say `same` of what is not the same."""
    return DIFFERENT if stored == "same" else stored


def verdict(
    similarity: float, copy_distance: float, seam: float, thresholds: Thresholds, screen: str = "", copy: str = ""
) -> tuple[bool, str]:
    """Whether thresholds keep a pair, and `"kept"`, the first test of `TESTS` that failed (`DIFFERENT` for `same`), or
    the `screen` or the test of copies that did.

    Geometry first, then single panels, then the copy tests, then identity: a bad cut makes the later numbers
    meaningless. NaN fails its test.
    """
    if not seam >= thresholds.seam:
        return False, "seam"
    if screen:
        return False, f"{SCREEN}: {screen}"
    if not copy_distance >= thresholds.near_copy:
        return False, "near_copy"
    if copy:
        return False, f"{COPY}: {copy}"
    if not similarity >= thresholds.same:
        return False, DIFFERENT
    return True, "kept"


def failed_screen(panels: Sequence[Mapping[str, float]], limits: Limits) -> str:
    """The first screen of `limits` that one of a pair's panels fails, by its scores `{name: score}`; `""` if none.

    A score that is NaN, or is not there, fails.
    """
    for name, limit in limits.items():
        for scores in panels:
            score = scores.get(name, math.nan)
            if not limit.get("least", -math.inf) <= score <= limit.get("most", math.inf):
                return name
    return ""


def failed_copy(measured: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """What says first that two panels are one picture: `hash` (bits), `mirrored` (bits) or `embedding` (cosine); `""`
    if nothing does. A number that is NaN, or is not there, fails."""
    for name, limit in COPY_TESTS.items():
        number = measured.get(name, math.nan)
        if limit in limits and not (number < limits[limit] if name == "embedding" else number > limits[limit]):
            return name
    return ""


def judged_again(row: Mapping[str, Any], thresholds: Thresholds, bounds: Bounds = NONE) -> tuple[bool, str]:
    """A candidate's verdict under other thresholds, from its stored numbers: no judge, no picture.

    `bounds` need the column `evidence`; without them no screen and no test of copies is looked at. A candidate refused
    for another reason than these stays refused; one that no judge was asked about and now comes so far is `unasked`.
    """
    before = reason_now(row["reason"])
    again = row["kept"] or before in ("seam", "near_copy", DIFFERENT, UNASKED)
    again = again or (bounds.screens is not None and before.startswith(f"{SCREEN}:"))
    again = again or (bounds.copies is not None and before.startswith(f"{COPY}:"))
    if not again:
        return row["kept"], before
    screen = copy = ""
    if bounds.screens or bounds.copies:
        evidence = json.loads(row["evidence"])
        if bounds.screens:
            scores = evidence["screens"]
            screen = failed_screen((scores["reference"], scores["target"]), bounds.screens)
        if bounds.copies:
            copy = failed_copy(evidence["copies"], bounds.copies)
    keep, reason = verdict(row["similarity"], row["copy_distance"], row["seam"], thresholds, screen, copy)
    if reason == DIFFERENT != before and math.isnan(row["similarity"]):
        return False, UNASKED
    return keep, reason


def select(rows: list[dict[str, Any]], thresholds: Thresholds, bounds: Bounds = NONE) -> list[dict[str, Any]]:
    """The rows of `candidates` that `thresholds` and `bounds` keep, their verdict brought up to date."""
    kept = []
    for row in rows:
        keep, reason = judged_again(row, thresholds, bounds)
        if keep:
            kept.append({**row, "kept": keep, "reason": reason})
    return kept


# Which tests of curation can refuse a pair under a recipe: what a card may say of how pairs were chosen.


def in_force(recipe: Recipe) -> tuple[list[str], dict[str, Any]]:
    """The tests of curation that can refuse a pair under this recipe, in words, and their limits; both empty where
    every threshold is off."""
    task, settings = tasks.load(recipe.task), recipe.curate
    thresholds = task.thresholds(settings.thresholds)
    tests: list[str] = []
    limits: dict[str, Any] = {}
    if thresholds.same > (0 if settings.vlm else -1):  # the least that a judge can say
        tests.append("its panels show the same subject")
        limits |= {"judge": settings.vlm.model if settings.vlm else settings.judge, "threshold: same": thresholds.same}
    copies = settings.copies.limits() if settings.copies else {}
    if thresholds.near_copy > 0 or copies:
        tests.append("neither panel is a copy of the other")
    if thresholds.near_copy > 0:
        limits["threshold: near_copy"] = thresholds.near_copy
    if thresholds.seam > -1:
        tests.append("they were cut at a clear seam")
        limits["threshold: seam"] = thresholds.seam
    screens = settings.screens.limits() if settings.screens else {}
    if screens:
        tests.append(f"both panels passed the screens {', '.join(screens)}")
    if task.geometry == "aligned":
        tests.append("the panels align and differ")
    if settings.duplicates and (settings.duplicates.hash is not None or settings.duplicates.embedding is not None):
        tests.append("no earlier pair shows the same")
    further = {f"limit: {name}": value for name, value in settings.further().items() if value is not None}
    return tests, limits | further
