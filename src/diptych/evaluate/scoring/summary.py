"""Lines of scores to metrics: the headline with intervals, by split, level and category, compared pairwise, with costs.

Everything follows from `samples/scores.jsonl` by arithmetic (`metrics.py`); the same lines give the same numbers.
Methods of two folders are compared on the samples that both have:

    compare_folders("evaluations/a:student", "evaluations/b:student")
    compare_folders("runs/first:student", "runs/second:tuned-0.002-200")      # runs that were scored, as well
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data import places
from diptych.errors import UsageError, UserError, nearest
from diptych.evaluate.evaluation import FILE, Evaluation
from diptych.evaluate.methods import ANCHORS, tuning
from diptych.evaluate.scoring import metrics
from diptych.evaluate.suites import MAIN, Sample
from diptych.utils.documents import parse_json

COSINE = (-1.0, 1.0)
MEANS = {"clip_i": COSINE, "clip_t": COSINE, "dino": COSINE, "dinov2": COSINE, "diversity": (0.0, 2.0)}  # their bounds
Line = dict[str, Any]
SAME = ("suite", "version")  # of two evaluations that are compared


def summarize(
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
        "levels": {name: grouped(judged, name, "level") for name in names},
        "attributes": {name: attribute_rates([x for x in judged if "met" in x], name) for name in names},
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
    found = metrics.summary(outcome(judged, name, split), times)
    own = [line for line in lines if line["method"] == name and line["split"] == split]
    for key, bounds in MEANS.items():
        known = [line for line in own if line.get(key) is not None]
        if known:
            mean, ci = metrics.mean_of(*_arrays(known, key), times, bounds)
            found[key] = mean
            found["ci95"][key] = ci
    debiased = [line | {"cp": line["cp_debiased"]} for line in judged if line.get("cp_debiased") is not None]
    if any(line["method"] == name and line["split"] == split for line in debiased):
        again = metrics.summary(outcome(debiased, name, split), times)
        for key in ("cp", "cp_pf"):
            found[f"{key}_debiased"] = again[key]
            found["ci95"][f"{key}_debiased"] = again["ci95"][key]
    return found


def _arrays(lines: Sequence[Line], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([line["identity"] for line in lines]), np.array([line[key] for line in lines], float)


def outcome(lines: Sequence[dict[str, Any]], name: str, split: str) -> metrics.ScoreArrays:
    """The arrays of one method on one split. UserError if it has no picture there."""
    own = sorted((x for x in lines if x["method"] == name and x["split"] == split), key=lambda x: x["id"])
    if not own:
        raise UserError(f"{name}: every picture of the split '{split}' failed; see failed/evaluate/{name}")
    columns = ([x[key] for x in own] for key in ("identity", "cp", "pf", "copied"))
    return metrics.ScoreArrays(*(np.array(column) for column in columns))


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


def compare(
    a: Sequence[Line], b: Sequence[Line], first: str, second: str, times: int, keys: Sequence[str] = metrics.NAMES
) -> dict[str, dict[str, Any]]:
    """Method `first` of lines `a` minus `second` of lines `b`, on the pictures both have, for every score of `keys`."""
    ids = {x["id"] for x in a if x["method"] == first} & {x["id"] for x in b if x["method"] == second}
    if not ids:
        raise UserError(f"{first} and {second} have no sample in common; they need the same suite and seeds")
    one, other = (
        outcome([x for x in lines if x["id"] in ids], name, MAIN) for lines, name in ((a, first), (b, second))
    )
    return {name: metrics.compare(one, other, times, name) for name in keys}


# ---- time, memory and money


def add_speed(result: dict[str, Any], out: Path) -> None:
    """To each method the median seconds a picture took over batches and, where it trains for each subject, those."""
    speed, tuned = _per_method(out, lambda event: event["seconds"] / event["images"]), tuning.seconds_per_subject(out)
    for by in (result["methods"], *(split["methods"] for split in result["splits"].values())):
        for name, found in by.items():
            found["seconds_per_image"] = round(statistics.median(speed[name]), 5) if name in speed else None
            if name in tuned:
                found["seconds_per_subject"] = tuned[name]


def _per_method(out: Path, value: Callable[[dict[str, Any]], Any]) -> dict[str, list[Any]]:
    """A value of each batch in the folder's log, by method; batches without it are left out."""
    found: dict[str, list[Any]] = {}
    for event in places.read(out):
        if event.get("event") == "drawn" and event["images"] and value(event) is not None:
            found.setdefault(event["method"], []).append(value(event))
    return found


def add_details(result: dict[str, Any], evaluation: Evaluation, lines: Sequence[Line], out: Path) -> None:
    """Scores by category, pictures without a score, and to each method what a picture of it costs: memory, the
    machine's time, and what the judge was paid for looking at it."""
    judge = evaluation.judge.endpoint
    price: Callable[[int, int], float | None] | None = judge.cost if judge else None
    names = [*result["methods"], *result["anchors"]]
    judged = [line for line in lines if line.get("cp") is not None and line.get("pf") is not None]
    result["categories"] = {name: grouped(judged, name, "kind") for name in names}
    result["unjudged"] = {name: sum(x["method"] == name and x.get("cp") is None for x in lines) for name in names}
    memory = _per_method(out, lambda event: event.get("peak_bytes") or None)
    for name, found in result["methods"].items():
        found["peak_memory_bytes"] = max(memory[name]) if name in memory else None
        tokens = [line["judge_tokens"] for line in lines if line["method"] == name and "judge_tokens" in line]
        seconds, hour = found["seconds_per_image"], evaluation.hour_price
        found["drawing_cost"] = None if hour is None or seconds is None else round(seconds / 3600 * hour, 6)
        if tokens:
            mean = [round(float(value), 1) for value in np.mean(tokens, axis=0)]
            found["judge_tokens_per_image"] = mean
            total = price(*(int(v) for v in np.sum(tokens, axis=0))) if price else None
            found["judging_cost"] = None if total is None else round(total / len(tokens), 6)


# ---- two evaluations


def compare_folders(a: str, b: str, out: Path | None = None, times: int = 1000) -> dict[str, Any]:
    """`a` minus `b`: each is `FOLDER:METHOD`, a folder with one model, or a method of the folder `out`. A folder is an
    evaluation's or a run's.

    UsageError if they were not asked the same, or scored by the same judge; UserError for a folder that is not scored.
    """
    (one, first), (other, second) = (_find(text, out) for text in (a, b))
    left, right = (_read(folder) for folder in (one, other))
    for key in SAME:
        if left.get(key) != right.get(key):
            raise UsageError(
                f"{a} and {b} cannot be compared: {key} {left.get(key)} there and {right.get(key)} here; "
                "evaluate both on one suite"
            )
    if _judge(left) != _judge(right):
        raise UsageError(f"{a} and {b} were scored by different judges; numbers are not portable between them")
    found = compare(_lines(one), _lines(other), _known(first, left), _known(second, right), times)
    return {"a": f"{one}:{first}", "b": f"{other}:{second}", "suite": left["suite"], "scores": found}


def format_comparison(found: dict[str, Any]) -> list[str]:
    """A comparison for people."""
    scores = found["scores"]
    n = scores["cp_pf"]["n"]
    told = [f"{found['a']} − {found['b']} on the same {n} pictures of {found['suite']}", ""]
    names = {"cp": "CP", "pf": "PF", "cp_pf": "CP·PF", "copy_rate": "copy rate"}
    for key, c in scores.items():
        low, high = c["ci95"]
        told.append(f"{names[key]:<10} {c['difference']:+.3f}  95 % {low:+.3f} to {high:+.3f}  p {metrics.p_said(c)}")
    return [*told, "", "p: permutation test over references, two-sided; differences of 0 are the null hypothesis"]


def _find(text: str, out: Path | None) -> tuple[Path, str]:
    folder, _, method = text.rpartition(":")
    if folder and _is_scored(Path(folder)):
        return Path(folder), method
    if _is_scored(Path(text)):
        found = _read(Path(text))
        names = list(found["settings"]["models"] if (Path(text) / FILE).is_file() else found["methods"])
        if len(names) != 1:
            raise UsageError(f"{text} has {len(names)} methods ({', '.join(names)}); name one: {text}:NAME")
        return Path(text), names[0]
    if out is not None and _is_scored(out):
        return out, text
    raise UserError(
        f"{text}: no scored evaluation; write FOLDER:METHOD (the folder of a run or of `diptych evaluate --suite`), or "
        "METHOD with --out FOLDER"
    )


def _is_scored(folder: Path) -> bool:
    return (folder / "report" / "metrics.json").is_file()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "report" / "metrics.json"
    try:
        return parse_json(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); score it again") from error


def _judge(found: dict[str, Any]) -> Any:
    judges = found.get("judges", {})
    return judges.get("judge") or [judges.get(role, {}).get("fingerprint") for role in ("scorer", "reader")]


def _known(method: str, found: dict[str, Any]) -> str:
    names = [*found.get("methods", {}), *found.get("anchors", {})]
    if method not in names:
        raise UsageError(f"unknown method '{method}'; scored are {', '.join(names)}{nearest(method, names)}")
    return method


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "samples" / "scores.jsonl"
    try:
        found = [parse_json(line) for line in path.read_text("utf8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); score it again") from error
    return [line for line in found if line.get("cp") is not None and line.get("pf") is not None]
