"""Which candidates become pairs: what the thresholds keep, no earlier pair shows already, and nobody rejected.

Reads stored numbers only, so other thresholds need no judge (`recurate`).
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from diptych.data import labels, records
from diptych.data.engine import Failure, Row, Work
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe, Thresholds
from diptych.run.resolve import free_name
from diptych.stages.curate import duplicates


def limits(recipe: Recipe, task: tasks.Task) -> tuple[Thresholds, records.Bounds]:
    """What a pair must pass: the thresholds, as the task has them, and the limits of screens and copies."""
    return task.thresholds(recipe.curate.thresholds), records.Bounds.of(recipe.curate)


def repeats(candidates: Dataset, recipe: Recipe, task: tasks.Task) -> dict[str, duplicates.Repeat]:
    """The pairs that the limits keep and that show again what an earlier one shows, by id."""
    asked = recipe.curate.duplicates
    return duplicates.find(candidates, asked, *limits(recipe, task)) if asked is not None else {}


class Select:
    """The stage that makes `pairs/` of `candidates/`."""

    name = "select"
    batch_size = 256

    def __init__(self, candidates: Dataset, recipe: Recipe, task: tasks.Task, decided: dict[str, bool]) -> None:
        """`decided` are people's decisions on single pairs, which hold whatever the numbers say."""
        self.candidates, self.recipe, self.task, self.decided = candidates, recipe, task, decided

    def made_by(self) -> dict[str, Any]:
        """What the manifest says of it."""
        thresholds, bounds = limits(self.recipe, self.task)
        repeated = self.recipe.curate.duplicates
        said = {
            "thresholds": thresholds.model_dump(),
            "screens": bounds.screens,
            "copies": bounds.copies,
            "duplicates": repeated.model_dump() if repeated is not None else None,
            "decided": labels.counts(self.decided) if self.decided else None,
        }
        return {"thresholds": thresholds.model_dump()} | {
            key: value for key, value in said.items() if value is not None
        }

    def load(self) -> Work:
        """Rows to the same rows, or to nothing; a row that repeats an earlier one or was rejected by hand fails."""
        again = repeats(self.candidates, self.recipe, self.task)
        thresholds, bounds = limits(self.recipe, self.task)
        by_hand = labels.both_ways(self.decided)

        def one(row: Row) -> list[Row] | Failure:
            accepted = by_hand.get(row["id"])
            if accepted is not None:
                return [{**row, "kept": True, "reason": records.ACCEPTED}] if accepted else Failure(records.REJECTED)
            if row["id"] in again:
                return Failure(again[row["id"]].reason)
            return records.select([row], thresholds, bounds)

        return lambda rows: [one(row) for row in rows]


def refuse_none(candidates: Dataset, folder: Any) -> None:
    """UserError that says why none of a run's candidates is a pair."""
    reasons = Counter(reason for _, _, batch in batches(candidates, "reason") for reason in batch["reason"])
    raise UserError(
        f"curation kept none of {len(candidates)} candidate pairs "
        f"({', '.join(f'{reason}: {n}' for reason, n in reasons.most_common()) or 'there were none'}); "
        f"see {candidates.url}. Another threshold needs no new grids and no judge: diptych data recurate "
        f"{folder} --set same=NUMBER --out {free_name(folder)}"
    )


def reconsidered(row: Row, thresholds: Thresholds, bounds: records.Bounds) -> Row:
    """A candidate as curation writes it under these limits: its verdict, and the thresholds that its evidence names."""
    kept, reason = records.judged_again(row, thresholds, bounds)
    evidence = json.loads(row["evidence"])
    if "thresholds" in evidence:
        evidence["thresholds"] = {name: getattr(thresholds, name) for name in evidence["thresholds"]}
    if "screens" in evidence:
        evidence["screens"]["limits"] = bounds.screens
    if "copies" in evidence:
        evidence["copies"]["limits"] = bounds.copies
    text = json.dumps(evidence, ensure_ascii=False, sort_keys=True)
    return {**row, "kept": kept, "reason": reason, "evidence": text}
