"""Rows of each stage: arrow schemas, ids, seeds, and the rule that accepts a pair.

prompts → grids → candidates → pairs. A pair's columns start with those of the released data set
(`primecai/dsd_data`: `conditioning`, `image`, `caption`), so that its readers open ours. Image columns are the Hugging
Face `Image` struct `{bytes, path}`, and the schema metadata says so: `datasets.load_dataset("parquet", …)` and the
hub's viewer show images.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diptych.recipe import tasks

if TYPE_CHECKING:
    import pyarrow as pa

    from diptych.recipe.schema import Curate, Recipe, Thresholds

IMAGE = "image"

# Column name → type, in order. `image` is the struct, `list[string]` a list of strings; the others are arrow types.
PROMPT = {
    "id": "string",
    "prompt": "string",  # for the whole grid
    "panels": "list[string]",  # the caption of each panel, row by row
    "subject": "string",  # kind of the subject, one word or a short phrase
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
    "rows": "int64",  # of panels
    "cols": "int64",  # of panels
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
    "similarity": "float64",  # by the judge; higher means more likely the same subject
    "copy_distance": "float64",  # pixels after alignment, 0 = a copy
    "seam": "float64",  # strength of the seam at which the grid was cut
    "kept": "bool",
    "reason": "string",  # "kept", or the first test that failed
    "judge": "string",  # fingerprint of the judge
    "evidence": "string",  # JSON: all other data behind the verdict
}
FAILED = {"stage": "string", "id": "string", "reason": "string", "row": "string"}

COLUMNS = {"prompts": PROMPT, "grids": GRID, "candidates": PAIR, "pairs": PAIR, "failed": FAILED}


def schema(columns: dict[str, str]) -> pa.Schema:
    """The arrow schema of a column table, with the metadata that makes `datasets` decode images."""
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
    """Id of a prompt: the 13th of a run is `p-000012`."""
    return f"p-{index:06d}"


def grid_id(from_prompt: str, image: int = 0) -> str:
    """Id of a grid, by its prompt: `p-000012` → `g-000012`; the second image is `g-000012.1`."""
    return "g-" + from_prompt.partition("-")[2] + (f".{image}" if image else "")


def prompt_of(grid: str) -> str:
    """Common id of all grids of a prompt: `g-000012` for `g-000012` and `g-000012.1`."""
    return re.sub(r"(g-\d+)\.\d+$", r"\1", grid)


def pair_id(from_grid: str, reference: int, target: int) -> str:
    """Id of an ordered pair of a grid's panels: `g-000012`, 0, 1 → `c-000012-01`."""
    return f"c-{from_grid.partition('-')[2]}-{reference}{target}"


def mirrors(pair: str) -> list[str]:
    """Id of the pair of the same two panels in the other order: `c-000012-01` → `c-000012-10`. Three digits can be
    split in two ways, so there are two ids."""
    head, _, panels = pair.rpartition("-")
    if not head or not panels.isdecimal() or len(panels) < 2:
        return []
    cuts = [len(panels) // 2] if len(panels) % 2 == 0 else [len(panels) // 2, len(panels) // 2 + 1]
    return [f"{head}-{panels[cut:]}{panels[:cut]}" for cut in cuts]


def seed_of(run_seed: int, row_id: str, purpose: str = "") -> int:
    """A row's 63-bit seed, from the run's seed and the row's id, so that it does not depend on order or batch.

    `purpose` gives a row several independent seeds (for its template, its noise, …).
    """
    digest = hashlib.sha256(f"{run_seed}\0{row_id}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


TESTS = ("seam", "near_copy", "same")  # thresholds, in the order of the tests
DIFFERENT = "different"  # reason of a pair below the threshold `same`
SCREEN = "screen"  # `screen: NAME` is the reason of a pair with a panel that a screen rejects
COPY = "near_copy"  # `near_copy: hash` is the reason of a pair whose target is a copy by the test `hash`
COPY_TESTS = {"hash": "hash", "mirrored": "hash", "embedding": "embedding"}  # score → its limit
UNASKED = "unasked"  # reason of a pair that new limits send to a judge which has not seen it
DUPLICATE = "duplicate"  # `duplicate of ID: TEST` is the reason of a repeat, in `failed/select/`
ACCEPTED, REJECTED = "accepted by hand", "rejected by hand"  # reasons in `pairs/` and `failed/select/`; see `labels`

Limits = Mapping[str, Mapping[str, float]]  # `Screens.limits`: name → {"least" or "most": number}


@dataclass(frozen=True)
class Bounds:
    """Limits in addition to the thresholds: of screens (`Screens.limits`) and of tests for copies (`Copies.limits`).
    None means that the run has not measured them, so the evidence has no scores."""

    screens: Limits | None = None
    copies: Mapping[str, float] | None = None

    @classmethod
    def of(cls, curate: Curate) -> Bounds:
        """The bounds of a recipe."""
        screens, copies = curate.screens, curate.copies
        return cls(screens.limits() if screens else None, copies.limits() if copies else None)


NONE = Bounds()


def reason_now(stored: str) -> str:
    """A stored reason by its present name. Rows of older versions have `same` instead of `different`."""
    return DIFFERENT if stored == "same" else stored


def verdict(
    similarity: float, copy_distance: float, seam: float, thresholds: Thresholds, screen: str = "", copy: str = ""
) -> tuple[bool, str]:
    """Whether the thresholds accept a pair, and the reason: `"kept"`, or the first test that failed.

    The order is geometry, single panels, copies, identity, because a bad cut makes the later scores meaningless.
    `screen` and `copy` name the screen and the test for copies that failed, if any. NaN fails its test.
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
    """The first screen of `limits` that one of the panels fails, by their scores `{name: score}`; `""` if none does.

    A score that is NaN or missing fails.
    """
    for name, limit in limits.items():
        for scores in panels:
            score = scores.get(name, math.nan)
            if not limit.get("least", -math.inf) <= score <= limit.get("most", math.inf):
                return name
    return ""


def failed_copy(measured: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """The first test by which the target is a copy: `hash` (bits), `mirrored` (bits) or `embedding` (cosine); `""` if
    none. A score that is NaN or missing counts as a copy."""
    for name, limit in COPY_TESTS.items():
        score = measured.get(name, math.nan)
        if limit in limits and not (score < limits[limit] if name == "embedding" else score > limits[limit]):
            return name
    return ""


def judged_again(row: Mapping[str, Any], thresholds: Thresholds, bounds: Bounds = NONE) -> tuple[bool, str]:
    """A candidate's verdict under other thresholds, from its stored scores, without a judge or images.

    `bounds` need the column `evidence`; without them, screens and tests for copies are skipped. A candidate that was
    rejected for another reason stays rejected. One that now reaches a judge which has not seen it is `unasked`.
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
    """The candidates that `thresholds` and `bounds` accept, with their new verdicts."""
    verdicts = [(row, *judged_again(row, thresholds, bounds)) for row in rows]
    return [{**row, "kept": keep, "reason": reason} for row, keep, reason in verdicts if keep]


def in_force(recipe: Recipe) -> tuple[list[str], dict[str, Any]]:
    """The tests that can reject a pair under this recipe, in words for a card, and their limits; both are empty if all
    tests are off."""
    task, settings = tasks.load(recipe.task), recipe.curate
    thresholds = task.thresholds(settings.thresholds)
    tests: list[str] = []
    limits: dict[str, Any] = {}
    if thresholds.same > (0 if settings.vlm else -1):  # the lowest score of a judge
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
