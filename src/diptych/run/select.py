"""Selects pairs among candidates: accepted by the thresholds, not a repeat of an earlier pair, not rejected by people.

It reads stored measurements only, so other thresholds need no judge (`recurate`).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from diptych.data import labels, verdicts
from diptych.data.engine import Failure, Row, Work
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe, Thresholds
from diptych.run.resolve import free_name
from diptych.stages.curate import duplicates
from diptych.utils import licenses
from diptych.utils.opening import folder_of


def limits(recipe: Recipe, task: tasks.Task) -> tuple[Thresholds, verdicts.Bounds]:
    """Return the thresholds with the task's values, and the limits of screens and copies."""
    return task.thresholds(recipe.curate.thresholds), verdicts.Bounds.of(recipe.curate)


def repeats(candidates: Dataset, recipe: Recipe, task: tasks.Task) -> dict[str, duplicates.Repeat]:
    """Return the accepted candidates that repeat an earlier pair, by id."""
    settings = recipe.curate.duplicates
    return duplicates.find(candidates, settings, *limits(recipe, task)) if settings is not None else {}


class SelectStage:
    """The stage that makes `pairs/` from `candidates/`."""

    name = "select"
    batch_size = 256

    def __init__(self, candidates: Dataset, recipe: Recipe, task: tasks.Task, decided: dict[str, bool]) -> None:
        """`decided` are people's decisions on single pairs, which override the measurements."""
        self.candidates, self.recipe, self.task, self.decided = candidates, recipe, task, decided

    def made_by(self) -> dict[str, Any]:
        """Return the stage's settings for the manifest."""
        thresholds, bounds = limits(self.recipe, self.task)
        repeated = self.recipe.curate.duplicates
        teacher = self.recipe.teacher
        license = licenses.stated(licenses.inherited(teacher, folder_of(teacher))[0])
        settings = {
            "teacher": teacher,
            "license": license or "unknown",
            "thresholds": thresholds.model_dump(),
            "screens": bounds.screens,
            "copies": bounds.copies,
            "duplicates": repeated.model_dump() if repeated is not None else None,
            "decided": labels.counts(self.decided) if self.decided else None,
        }
        return {key: value for key, value in settings.items() if value is not None}

    def load(self) -> Work:
        """Return the function that passes or drops rows; repeats and pairs that people rejected fail."""
        repeated = repeats(self.candidates, self.recipe, self.task)
        thresholds, bounds = limits(self.recipe, self.task)
        by_hand = labels.both_ways(self.decided)

        def one(row: Row) -> list[Row] | Failure:
            accepted = by_hand.get(row["id"])
            if accepted is not None:
                return [{**row, "kept": True, "reason": verdicts.ACCEPTED}] if accepted else Failure(verdicts.REJECTED)
            if row["id"] in repeated:
                return Failure(repeated[row["id"]].reason)
            return verdicts.select([row], thresholds, bounds)

        return lambda rows: [one(row) for row in rows]


def none_accepted(candidates: Dataset, folder: Path) -> UserError:
    """Return the error of a run without pairs, with the reasons of its candidates."""
    reasons = Counter(reason for _, _, batch in batches(candidates, "reason") for reason in batch["reason"])
    shown = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common()) or "there were none"
    return UserError(
        "run_empty",
        f"Curation accepted none of {len(candidates)} candidate pairs ({shown}); see {candidates.url}. Try other "
        f"thresholds, without a judge: diptych data recurate {folder} --set same=NUMBER --out {free_name(folder)}",
    )


def reconsidered(row: Row, thresholds: Thresholds, bounds: verdicts.Bounds) -> Row:
    """Return a candidate with the verdict of these limits, and with these limits in its evidence."""
    kept, reason = verdicts.judged_again(row, thresholds, bounds)
    evidence = json.loads(row["evidence"])
    if "thresholds" in evidence:
        evidence["thresholds"] = {name: getattr(thresholds, name) for name in evidence["thresholds"]}
    if "screens" in evidence:
        evidence["screens"]["limits"] = bounds.screens
    if "copies" in evidence:
        evidence["copies"]["limits"] = bounds.copies
    text = json.dumps(evidence, ensure_ascii=False, sort_keys=True)
    return {**row, "kept": kept, "reason": reason, "evidence": text}
