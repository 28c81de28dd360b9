"""Which tests of curation can refuse a pair under a recipe: what a card may say of how pairs were chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diptych.recipe import tasks

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe


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
