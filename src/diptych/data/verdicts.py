"""Verdicts: the rule that accepts or rejects a pair, from its stored scores, and the reason that it gives."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diptych.recipe import tasks

if TYPE_CHECKING:
    from diptych.recipe.schema import Curate, Recipe, Thresholds

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
