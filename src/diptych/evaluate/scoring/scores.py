"""Pictures to numbers: one line for each picture in `samples/scores.jsonl`, and the metrics that follow from the lines.

Reads only what was drawn (`samples/METHOD/`) and renders of its own; draws nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data import places
from diptych.data.store import Dataset, write_atomic
from diptych.errors import UserError
from diptych.evaluate.methods import ANCHORS, tuning
from diptych.evaluate.methods.base import Context
from diptych.evaluate.scoring import curation, metrics, truth
from diptych.evaluate.suites import MAIN, Sample
from diptych.recipe import tasks

SAID = ("id", "method", "split", "identity", "kind", "level", "seed")
STUDENTS = ("student", "student_shipped")


@dataclass
class Judges:
    """The three models that look at pictures, and how they are known."""

    scorer: Any
    curator: Any
    reader: Any
    about: dict[str, dict[str, str]]  # role → {"name", "fingerprint"}


def score(context: Context, samples: Sequence[Sample], names: Sequence[str], judges: Judges) -> dict[str, Any]:
    """Scores the pictures in `samples/`, writes `samples/scores.jsonl`, and returns the metrics."""
    recipe, suite, run_dir = context.recipe, context.suite, context.run_dir
    times = recipe.evaluate.bootstrap
    embed = judges.scorer.embed
    scales = {split: truth.scale(suite, split, embed) for split in suite.splits}
    lines: list[dict[str, Any]] = []
    for name in names:
        lines += score_method(run_dir, name, scales, embed, judges.reader.read)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomic(run_dir / "samples" / "scores.jsonl", text.encode())

    methods = [name for name in names if name not in ANCHORS]
    outcomes = {split: {name: outcome(lines, name, split) for name in names} for split in suite.splits}
    summaries = {
        split: {name: metrics.summary(found, times) for name, found in by.items()} for split, by in outcomes.items()
    }
    speed, tuned = seconds_per_image(run_dir), tuning.seconds_per_subject(run_dir)
    for by in summaries.values():
        for name in methods:
            by[name]["seconds_per_image"] = speed.get(name)
            if name in tuned:
                by[name]["seconds_per_subject"] = tuned[name]
    result: dict[str, Any] = {
        "suite": suite.name,
        "version": suite.version,
        "methods": {name: summaries[MAIN][name] for name in methods},
        "anchors": {name: summaries[MAIN][name] for name in ANCHORS if name in summaries[MAIN]},
        "seeds": list(recipe.evaluate.seeds),
        "identities": len({sample.identity for sample in samples if sample.split == MAIN}),
        "prompts": recipe.evaluate.prompts,
        "splits": {
            split: {
                "methods": {name: by[name] for name in methods},
                "anchors": {name: by[name] for name in ANCHORS if name in by},
            }
            for split, by in summaries.items()
            if split != MAIN
        },
        "levels": {name: grouped(lines, name, "level") for name in names},
        "attributes": {name: attribute_rates(lines, name) for name in names},
        "comparisons": comparisons(outcomes[MAIN], times),
        "calibration": {split: {k: round(v, 5) for k, v in asdict(scale).items()} for split, scale in scales.items()},
    }
    measured = judged(context, judges, scales[MAIN]) if recipe.evaluate.yardsticks else {"judges": judges.about}
    return result | measured


def score_method(
    run_dir: Path, name: str, scales: Mapping[Any, metrics.Scale], embed: curation.Embed, read: truth.Read
) -> list[dict[str, Any]]:
    """One line for each picture of a method."""
    pictures = Dataset(run_dir / "samples" / name)
    return [
        {**{key: row[key] for key in SAID}, **line}
        for rows in map(pictures.read_shard, pictures.shards())
        for row, line in zip(rows, score_rows(rows, scales, embed, read), strict=True)
    ]


def score_rows(
    rows: Sequence[dict[str, Any]], scales: Mapping[Any, metrics.Scale], embed: curation.Embed, read: truth.Read
) -> list[dict[str, Any]]:
    """The numbers of each row of `samples/METHOD/`."""
    from diptych.data.images import open_image

    if not rows:
        return []
    images = [open_image(row["image"]) for row in rows]
    references = [open_image(row["reference"]) for row in rows]
    similarity = curation.similarities(references, images, embed)
    distances = metrics.copy_distances(references, images)
    lines: list[dict[str, Any]] = []
    for row, alike, distance, reading in zip(rows, similarity, distances, read(images), strict=True):
        scale, asked = scales[row["split"]], json.loads(row["asked"])
        met = metrics.following(asked, reading.values)
        lines.append(
            {
                "similarity": round(float(alike), 5),
                "cp": round(float(scale.concept(np.array([alike]))[0]), 5),
                "pf": round(sum(met.values()) / len(met), 5),
                "copy_distance": round(float(distance), 5),
                "copied": bool(distance < scale.copy_distance),
                "asked": asked,
                "read": {group: reading.values.get(group) for group in asked},
                "met": met,
            }
        )
    return lines


def outcome(lines: Sequence[dict[str, Any]], name: str, split: str) -> metrics.Outcome:
    """The arrays of one method on one split. UserError if it has no picture there."""
    own = sorted((x for x in lines if x["method"] == name and x["split"] == split), key=lambda x: x["id"])
    if not own:
        raise UserError(f"{name}: every picture of the split '{split}' failed; see failed/evaluate/{name}")
    columns = ([x[key] for x in own] for key in ("identity", "cp", "pf", "copied"))
    return metrics.Outcome(*(np.array(column) for column in columns))


def grouped(lines: Sequence[dict[str, Any]], name: str, key: str) -> dict[str, dict[str, float]]:
    """Mean scores of a method on the main split by level or kind."""
    own = [x for x in lines if x["method"] == name and x["split"] == MAIN]
    result = {}
    for value in dict.fromkeys(x[key] for x in own):
        part = outcome([x for x in own if x[key] == value], name, MAIN)
        result[value] = {k: round(v, 4) for k, v in part.means().items()} | {"n": len(part.cp)}
    return result


def attribute_rates(lines: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """How often each asked attribute was found in a method's pictures of the main split."""
    hits: dict[str, list[bool]] = {}
    for line in lines:
        if line["method"] == name and line["split"] == MAIN:
            for group, met in line["met"].items():
                hits.setdefault(group, []).append(met)
    return {group: round(float(np.mean(met)), 4) for group, met in hits.items()}


def comparisons(outcomes: dict[str, metrics.Outcome], times: int) -> dict[str, dict[str, Any]]:
    """Each student against each other method, paired: `{"student": {"inpaint": {…}}}`."""
    result: dict[str, dict[str, Any]] = {}
    for student in STUDENTS:
        if student in outcomes:
            rivals = [name for name in outcomes if name != student and name not in ANCHORS]
            pairable = [n for n in rivals if np.array_equal(outcomes[n].identity, outcomes[student].identity)]
            result[student] = {n: metrics.compare(outcomes[student], outcomes[n], times) for n in pairable}
    return result


def judged(context: Context, judges: Judges, scale: metrics.Scale) -> dict[str, Any]:
    """The judges' own errors on renders, and what they say about curation."""
    suite = context.suite
    through = truth.round_trip(context.teacher().vae)
    about: dict[str, dict[str, Any]] = {role: dict(known) for role, known in judges.about.items()}
    about["scorer"]["auc"] = truth.judge_auc(suite, judges.scorer.embed)
    about["curator"]["auc"] = truth.judge_auc(suite, judges.curator.embed)
    about["reader"]["accuracy"] = truth.reader_accuracy(suite, judges.reader.read)
    about["reader"]["accuracy_through_vae"] = truth.reader_accuracy(suite, judges.reader.read, through)
    pairs = truth.check_pairs(suite, through)

    def identify(images: Sequence[Any]) -> np.ndarray:
        return np.stack([reading.identity for reading in judges.reader.read(list(images))])

    witness = curation.witness(pairs, identify)
    limits = tasks.load(context.recipe.task).thresholds(context.recipe.curate.thresholds)
    curated = curation.on_renders(pairs, judges.curator.embed, limits)
    return {
        "copy_rate_of_renders": truth.copy_rate(suite, scale.copy_distance),
        "judges": about,
        "curation": {"renders": curated, "grids": curation.on_grids(context.run_dir, identify, witness)},
    }


def seconds_per_image(run_dir: Path) -> dict[str, float]:
    """Median over batches, from the log: what a picture took while drawing them in batches."""
    spent: dict[str, list[float]] = {}
    for event in places.read(run_dir):
        if event.get("event") == "drawn" and event["images"]:
            spent.setdefault(event["method"], []).append(event["seconds"] / event["images"])
    return {name: round(statistics.median(values), 5) for name, values in spent.items()}
