"""Lines of scores to metrics: the headline with intervals, by split, level and category, compared pairwise, with costs.

Everything follows from `samples/scores.jsonl` by arithmetic (`metrics.py`); the same lines give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diptych.errors import UserError
from diptych.evaluate.config import Evaluation
from diptych.evaluate.methods import ANCHORS
from diptych.evaluate.scoring import metrics, scores
from diptych.evaluate.suites import MAIN, Sample

COSINE = (-1.0, 1.0)
MEANS = {"clip_i": COSINE, "clip_t": COSINE, "dino": COSINE, "dinov2": COSINE, "diversity": (0.0, 2.0)}  # their bounds
Line = dict[str, Any]


def summarise(
    evaluation: Evaluation, suite: Any, samples: Sequence[Sample], lines: Sequence[Line], names: Sequence[str]
) -> dict[str, Any]:
    """The metrics of scored lines: the contract's keys, then ours."""
    judged = [line for line in lines if line.get("cp") is not None and line.get("pf") is not None]
    for name in names:
        if not any(line["method"] == name for line in judged):
            raise UserError(f"{name}: the judge has scored none of its pictures; run the same command again")
    splits = list(dict.fromkeys(line["split"] for line in judged))
    by_split = {
        split: {name: _summary(judged, lines, name, split, evaluation.bootstrap) for name in names} for split in splits
    }
    methods = [name for name in names if name not in ANCHORS]
    anchors = [name for name in names if name in ANCHORS]
    main = [sample for sample in samples if sample.split == MAIN]
    per = len({sample.identity for sample in main}) or 1
    return {
        "suite": suite.name,
        "version": suite.version,
        "methods": {name: by_split[MAIN][name] for name in methods},
        "anchors": {name: by_split[MAIN][name] for name in anchors},
        "identities": per,
        "prompts": round(len(main) / per, 2),
        "splits": {
            split: {"methods": {n: by[n] for n in methods}, "anchors": {n: by[n] for n in anchors}}
            for split, by in by_split.items()
            if split != MAIN
        },
        "levels": {name: scores.grouped(judged, name, "level") for name in names},
        "categories": {name: scores.grouped(judged, name, "kind") for name in names},
        "attributes": {name: scores.attribute_rates([x for x in judged if "met" in x], name) for name in names},
        "comparisons": {
            name: {
                other: compare(judged, judged, name, other, evaluation.bootstrap)["cp_pf"]
                for other in methods
                if other != name
            }
            for name in evaluation.models
        },
        "unjudged": {name: sum(x["method"] == name and x.get("cp") is None for x in lines) for name in names},
    }


def _summary(judged: Sequence[Line], lines: Sequence[Line], name: str, split: str, times: int) -> dict[str, Any]:
    found = metrics.summary(scores.outcome(judged, name, split), times)
    own = [line for line in lines if line["method"] == name and line["split"] == split]
    for key, bounds in MEANS.items():
        known = [line for line in own if line.get(key) is not None]
        if known:
            mean, ci = metrics.mean_of(*_arrays(known, key), times, bounds)
            found[key] = mean
            found["ci95"][key] = ci
    debiased = [line | {"cp": line["cp_debiased"]} for line in judged if line.get("cp_debiased") is not None]
    if any(line["method"] == name and line["split"] == split for line in debiased):
        again = metrics.summary(scores.outcome(debiased, name, split), times)
        for key in ("cp", "cp_pf"):
            found[f"{key}_debiased"] = again[key]
            found["ci95"][f"{key}_debiased"] = again["ci95"][key]
    return found


def _arrays(lines: Sequence[Line], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([line["identity"] for line in lines]), np.array([line[key] for line in lines], float)


def compare(a: Sequence[Line], b: Sequence[Line], first: str, second: str, times: int) -> dict[str, dict[str, Any]]:
    """Method `first` of lines `a` minus `second` of lines `b`, on the pictures both have, for every score."""
    ids = {x["id"] for x in a if x["method"] == first} & {x["id"] for x in b if x["method"] == second}
    if not ids:
        raise UserError(f"{first} and {second} have no sample in common; they need the same suite and seeds")
    one, other = (
        scores.outcome([x for x in lines if x["id"] in ids], name, MAIN) for lines, name in ((a, first), (b, second))
    )
    return {name: metrics.compare(one, other, times, name) for name in metrics.NAMES}


def add_costs(result: dict[str, Any], evaluation: Evaluation, lines: Sequence[Line]) -> None:
    """To each method what a picture of it costs: the machine's time, and what the judge was paid for looking at it."""
    price: Callable[[int, int], float | None] | None = (
        evaluation.judge.endpoint.cost if evaluation.judge.endpoint else None
    )
    for name, found in result["methods"].items():
        tokens = [line["judge_tokens"] for line in lines if line["method"] == name and "judge_tokens" in line]
        seconds = found.get("seconds_per_image")
        found["drawing_cost"] = (
            None
            if evaluation.hour_price is None or seconds is None
            else round(seconds / 3600 * evaluation.hour_price, 6)
        )
        if tokens:
            mean = [round(float(value), 1) for value in np.mean(tokens, axis=0)]
            found["judge_tokens_per_image"] = mean
            total = price(*(int(v) for v in np.sum(tokens, axis=0))) if price else None
            found["judging_cost"] = None if total is None else round(total / len(tokens), 6)
