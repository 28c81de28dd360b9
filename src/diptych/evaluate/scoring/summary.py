"""Metrics from lines of scores: means with intervals, by split, level and category, paired comparisons, and costs.

Everything follows from `samples/scores.jsonl` by arithmetic (`metrics.py`), so equal lines give equal numbers. Methods
of two folders are compared on the samples that both have:

    compare_folders("evaluations/a:student", "evaluations/b:student")
    compare_folders("runs/first:student", "runs/second:tuned-0.002-200")      # scored runs
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data import places
from diptych.errors import UsageError, UserError, nearest
from diptych.evaluate import results
from diptych.evaluate.evaluation import FILE, Evaluation
from diptych.evaluate.methods import ANCHORS, tuning
from diptych.evaluate.results import has_scores
from diptych.evaluate.scoring import metrics, quality
from diptych.evaluate.suites import MAIN, Sample

COSINE, SHARE = (-1.0, 1.0), (0.0, 1.0)
MEANS = {"clip_i": COSINE, "clip_t": COSINE, "dino": COSINE, "dinov2": COSINE, "diversity": (0.0, 2.0)}  # bounds
MEANS |= {"retrieved": SHARE, "traits": SHARE, "sharpness": quality.LAPLACIAN}
Line = dict[str, Any]


def summarize(
    evaluation: Evaluation, suite: Any, samples: Sequence[Sample], lines: Sequence[Line], names: Sequence[str]
) -> dict[str, Any]:
    """The metrics of scored lines. UserError if a method has no scored image."""
    judged = [line for line in lines if has_scores(line)]
    for name in names:
        if not any(line["method"] == name for line in judged):
            message = f"The judge has scored no image of {name}. Run the same command again."
            raise UserError("run_incomplete", message)
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
        "levels": {name: grouped(judged, name, "level") for name in names},
        "attributes": {name: attribute_rates(judged, name, "met") for name in names},
        "traits": {name: attribute_rates(judged, name, "carried") for name in names},
        "comparisons": {
            name: {
                other: compare(judged, judged, name, other, evaluation.bootstrap, ("cp_pf",))["cp_pf"]
                for other in methods
                if other != name
            }
            for name in evaluation.models
            if name in methods
        },
        "seeds": list(evaluation.seeds),
    }


def _summary(judged: Sequence[Line], lines: Sequence[Line], name: str, split: str, times: int) -> dict[str, Any]:
    summary = metrics.summary(outcome(judged, name, split), times)
    chosen = [line for line in lines if line["method"] == name and line["split"] == split]
    for key, bounds in MEANS.items():
        known = [line for line in chosen if line.get(key) is not None]
        if known:
            identity = np.array([line["identity"] for line in known])
            values = np.array([line[key] for line in known], float)
            summary[key], summary["ci95"][key] = metrics.mean_of(identity, values, times, bounds)
    debiased = [line | {"cp": line["cp_debiased"]} for line in judged if line.get("cp_debiased") is not None]
    if any(line["method"] == name and line["split"] == split for line in debiased):
        again = metrics.summary(outcome(debiased, name, split), times)
        for key in ("cp", "cp_pf"):
            summary[f"{key}_debiased"] = again[key]
            summary["ci95"][f"{key}_debiased"] = again["ci95"][key]
    return summary


def outcome(lines: Sequence[Line], name: str, split: str) -> metrics.ScoreArrays:
    """The arrays of one method on one split. UserError if it has no image there."""
    chosen = sorted((x for x in lines if x["method"] == name and x["split"] == split), key=lambda x: x["id"])
    if not chosen:
        message = f"Every image of {name} in the split '{split}' failed. See failed/evaluate/{name} for the reasons."
        raise UserError("rows_failed", message)
    columns = ([x[key] for x in chosen] for key in ("identity", "cp", "pf", "copied"))
    return metrics.ScoreArrays(*(np.array(column) for column in columns))


def grouped(lines: Sequence[Line], name: str, key: str) -> dict[str, dict[str, float]]:
    """Mean scores of a method on the main split, by level or kind."""
    chosen = [x for x in lines if x["method"] == name and x["split"] == MAIN]
    groups = {}
    for value in dict.fromkeys(x[key] for x in chosen):
        part = outcome([x for x in chosen if x[key] == value], name, MAIN)
        groups[value] = {k: round(v, 4) for k, v in part.means().items()} | {"n": len(part.cp)}
    return groups


def attribute_rates(lines: Sequence[Line], name: str, key: str) -> dict[str, float]:
    """How often the reader found each attribute in a method's images of the main split: those that the prompt names
    (`met`), or traits of the subject (`carried`)."""
    hits: dict[str, list[bool]] = {}
    for line in lines:
        if line["method"] == name and line["split"] == MAIN:
            for group, met in line.get(key, {}).items():
                hits.setdefault(group, []).append(met)
    return {group: round(float(np.mean(met)), 4) for group, met in hits.items()}


def compare(
    a: Sequence[Line], b: Sequence[Line], first: str, second: str, times: int, keys: Sequence[str] = metrics.NAMES
) -> dict[str, dict[str, Any]]:
    """Method `first` of lines `a` minus `second` of lines `b`, on their common images, for every score of `keys`.

    UserError if they have no image in common.
    """
    ids = {x["id"] for x in a if x["method"] == first} & {x["id"] for x in b if x["method"] == second}
    if not ids:
        message = f"{first} and {second} have no sample in common. Evaluate both with the same suite and seeds."
        raise UserError("suite_mismatch", message)
    one, other = (
        outcome([x for x in lines if x["id"] in ids], name, MAIN) for lines, name in ((a, first), (b, second))
    )
    return {name: metrics.compare(one, other, times, name) for name in keys}


# ---- time, memory and money


def add_speed(result: dict[str, Any], out: Path) -> None:
    """Adds to each method the median seconds of an image over batches, and of a subject's training if it has one."""
    speed, tuned = _per_method(out, lambda event: event["seconds"] / event["images"]), tuning.seconds_per_subject(out)
    for by in (result["methods"], *(split["methods"] for split in result["splits"].values())):
        for name, scores in by.items():
            scores["seconds_per_image"] = round(statistics.median(speed[name]), 5) if name in speed else None
            if name in tuned:
                scores["seconds_per_subject"] = tuned[name]


def _per_method(out: Path, value: Callable[[dict[str, Any]], Any]) -> dict[str, list[Any]]:
    """A value of each batch in the folder's log, by method; batches without it are left out."""
    values: dict[str, list[Any]] = {}
    for event in places.read(out):
        if event.get("event") == "drawn" and event["images"] and value(event) is not None:
            values.setdefault(event["method"], []).append(value(event))
    return values


def add_details(result: dict[str, Any], evaluation: Evaluation, lines: Sequence[Line], out: Path) -> None:
    """Adds scores by category, the number of images without a score, and the cost of an image of each method: memory,
    machine time, and the price of judging."""
    judge = evaluation.judge.endpoint
    price: Callable[[int, int], float | None] | None = judge.cost if judge else None
    names = [*result["methods"], *result["anchors"]]
    judged = [line for line in lines if has_scores(line)]
    result["categories"] = {name: grouped(judged, name, "kind") for name in names}
    result["unjudged"] = {name: sum(x["method"] == name and x.get("cp") is None for x in lines) for name in names}
    memory = _per_method(out, lambda event: event.get("peak_bytes") or None)
    for name, scores in result["methods"].items():
        scores["peak_memory_bytes"] = max(memory[name]) if name in memory else None
        tokens = [line["judge_tokens"] for line in lines if line["method"] == name and "judge_tokens" in line]
        seconds, hour = scores["seconds_per_image"], evaluation.hour_price
        scores["drawing_cost"] = None if hour is None or seconds is None else round(seconds / 3600 * hour, 6)
        if tokens:
            scores["judge_tokens_per_image"] = [round(float(value), 1) for value in np.mean(tokens, axis=0)]
            total = price(*(int(v) for v in np.sum(tokens, axis=0))) if price else None
            scores["judging_cost"] = None if total is None else round(total / len(tokens), 6)


# ---- two evaluations


def compare_folders(a: str, b: str, out: Path | None = None, times: int = 1000) -> dict[str, Any]:
    """`a` minus `b`. Each is `FOLDER:METHOD`, a folder with one model, or a method of the folder `out`; a folder is
    that of an evaluation or a run.

    UsageError for different suites or judges. UserError for a folder without scores.
    """
    (one, first), (other, second) = (_find(text, out) for text in (a, b))
    left, right = results.read_metrics(one), results.read_metrics(other)
    for key in ("suite", "version"):
        if left.get(key) != right.get(key):
            fault = f"{key} {left.get(key)} and {key} {right.get(key)}. Evaluate both with one suite."
            raise UsageError("suite_mismatch", f"Cannot compare {a} with {b}: {fault}")
    if _judge(left) != _judge(right):
        message = f"Cannot compare {a} with {b}: different judges scored them. Score both with one judge."
        raise UsageError("suite_mismatch", message)
    _check_method(first, left)
    _check_method(second, right)
    mine, theirs = ([x for x in results.read_scores(folder) if has_scores(x)] for folder in (one, other))
    scores = compare(mine, theirs, first, second, times)
    return {"a": f"{one}:{first}", "b": f"{other}:{second}", "suite": left["suite"], "scores": scores}


def format_comparison(compared: dict[str, Any]) -> list[str]:
    """The lines that the command line prints for a result of `compare_folders`."""
    scores = compared["scores"]
    n = scores["cp_pf"]["n"]
    lines = [f"{compared['a']} − {compared['b']} on the same {n} images of {compared['suite']}", ""]
    names = {"cp": "CP", "pf": "PF", "cp_pf": "CP·PF", "copy_rate": "copy rate"}
    for key, c in scores.items():
        low, high = c["ci95"]
        p = metrics.format_p(c)
        lines.append(f"{names[key]:<10} {c['difference']:+.3f}  95 % {low:+.3f} to {high:+.3f}  p {p}")
    return [*lines, "", "p: two-sided permutation test over references; the null hypothesis is a difference of 0"]


def _find(text: str, out: Path | None) -> tuple[Path, str]:
    """The folder and method that a text names."""
    folder, _, method = text.rpartition(":")
    if folder and results.is_scored(Path(folder)):
        return Path(folder), method
    if results.is_scored(Path(text)):
        result = results.read_metrics(Path(text))
        names = list(result["settings"]["models"] if (Path(text) / FILE).is_file() else result["methods"])
        if len(names) != 1:
            message = f"{text} has {len(names)} methods ({', '.join(names)}). Pass one of them as {text}:NAME."
            raise UsageError("option_invalid", message)
        return Path(text), names[0]
    if out is not None and results.is_scored(out):
        return out, text
    raise UserError(
        "run_not_found",
        f"No scored evaluation found for {text}. Pass FOLDER:METHOD (the folder of a run or of `diptych evaluate "
        "--suite`), or METHOD with --out FOLDER.",
    )


def _judge(result: dict[str, Any]) -> Any:
    """What identifies the judges of a result."""
    judges = result.get("judges", {})
    return judges.get("judge") or [judges.get(role, {}).get("fingerprint") for role in ("scorer", "reader")]


def _check_method(method: str, result: dict[str, Any]) -> None:
    names = [*result.get("methods", {}), *result.get("anchors", {})]
    if method not in names:
        hint = nearest(method, names)
        raise UsageError("name_unknown", f"Unknown method '{method}'. Scored methods: {', '.join(names)}{hint}")
