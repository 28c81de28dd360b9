"""Agreement of a judge with people, or with the truth of renders: Krippendorff's alpha, as DreamBench++ reports it.

Ratings are JSON lines `{"id": …, "rater": …, "value": …}`. A value is a number on the scale of the labels (0 to 4), or
"same" or "different". The judge counts as one more rater. Values on another scale (a cosine) are first mapped to the
labels by rank, so that each label has the same share as among the people's ratings; the result reports this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import UsageError
from diptych.evaluate import results
from diptych.evaluate.scoring import metrics
from diptych.utils.documents import parse_json, read_lines

Ratings = dict[str, dict[str, float]]  # rater → id → value
WORDS = {"different": 0.0, "same": 1.0}
PUBLISHED = (
    "published agreement with people, CP: GPT-4o .50, DreamSim .42, DINO .31, CLIP-I .14; PF: GPT-4o .55, VQAScore .50 "
    "(other images and other people, so not directly comparable)"
)
TRUTHS = {"same": 4.0, "drifted": 2.0, "other": 0.0}  # scores of a pair of renders on the rubric's scale
RESAMPLED = 1000


def alpha(ratings: Sequence[Mapping[str, float]]) -> float | None:
    """Krippendorff's alpha of interval data: 1 − observed / expected disagreement over items with two values or more.

    None if it is not defined: no such item, or all values equal. (Krippendorff, Content Analysis, 2004, ch. 11.)
    """
    items = sorted({item for rater in ratings for item in rater})
    value = _alphas(_sums(ratings, items), np.ones((1, len(items))))[0]
    return None if np.isnan(value) else float(value)


def _sums(ratings: Sequence[Mapping[str, float]], items: Sequence[str]) -> np.ndarray:
    """Count, sum and sum of squares of each item's values, shape (3, items). Zeros for an item with one value."""
    table = np.array([[rater.get(item, np.nan) for item in items] for rater in ratings]).reshape(len(ratings), -1)
    sums = np.stack([np.sum(~np.isnan(table), 0), np.nansum(table, 0), np.nansum(table**2, 0)]).astype(float)
    return np.where(sums[0] > 1, sums, 0.0)


def _alphas(sums: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Alpha with item i counted `times[k, i]` times, shape (k,). NaN where it is not defined."""
    n, s, q = sums
    # The squared differences of all ordered pairs of n values sum to 2 (n Σx² − (Σx)²).
    within = times @ (2 * (n * q - s**2) / np.maximum(n - 1, 1))
    m, total, squares = times @ n, times @ s, times @ q
    with np.errstate(divide="ignore", invalid="ignore"):
        between = 2 * (m * squares - total**2) / (m - 1)
        return np.where((m > 1) & (between > 1e-9), 1 - within / between, np.nan)


def read_ratings(path: Path) -> Ratings:
    """Reads a ratings file, or labels from `diptych data audit`. UsageError names the line that is neither."""
    ratings: Ratings = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            item, rater = str(row["id"]), str(row.get("rater", row.get("labeller", "human")))
            given = row["value"] if "value" in row else row["label"]
            if given == "unsure":
                continue
            value = WORDS[given] if isinstance(given, str) else float(given)
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path}, line {number}: not a rating. Expected {{id, rater, value}}."
            raise UsageError("labels_invalid", message) from error
        ratings.setdefault(rater, {})[item] = value
    if not ratings:
        raise UsageError("labels_invalid", f"{path} has no ratings. Expected one {{id, rater, value}} a line.")
    return ratings


def read_scores(folder: Path, score: str) -> dict[str, float]:
    """A judge's values from an evaluation: METHOD/ID → `score` (cp, pf, cp_debiased, clip_i, …)."""
    lines = results.read_scores(folder)
    values = {f"{line['method']}/{line['id']}": float(line[score]) for line in lines if line.get(score) is not None}
    if not values:
        known = sorted({key for line in lines for key, value in line.items() if isinstance(value, float)})
        message = f"{folder / results.SCORES} has no score '{score}'. Scores in it: {', '.join(known) or 'none'}."
        raise UsageError("name_unknown", message)
    return values


def read_similarities(run: Path) -> dict[str, float]:
    """The curating judge's similarities of a run's candidates, by id of the pair."""
    from diptych.data.store import Dataset

    rows = Dataset(run / "candidates").columns("id", "similarity")
    return {row["id"]: row["similarity"] for row in rows if row["similarity"] == row["similarity"]}


def check(labels: Ratings, judge: Mapping[str, float], judge_name: str) -> dict[str, Any]:
    """Agreement of the judge with each rater and on average, and agreement among the raters.

    As published, `alpha` is the mean over the raters. Its interval resamples items.
    """
    items = sorted(set(judge) & {item for rater in labels.values() for item in rater})
    if len(items) < 2:
        message = f"The judge and the labels have {len(items)} items in common. Ids of an evaluation are METHOD/ID."
        raise UsageError("labels_invalid", message)
    steps = sorted({value for rater in labels.values() for value in rater.values()})
    values = {item: judge[item] for item in items}
    mapped = not set(values.values()) <= set(steps)
    if mapped:
        values = by_rank(values, [rater[item] for item in items for rater in labels.values() if item in rater])
    common = {name: {item: rater[item] for item in items if item in rater} for name, rater in labels.items()}
    each = {name: alpha([values, rater]) for name, rater in common.items() if rater}
    defined = [value for value in each.values() if value is not None]
    resampled = metrics.resample(np.arange(len(items)), RESAMPLED)
    pairs = np.stack([_alphas(_sums([values, rater], items), resampled) for rater in common.values() if rater])
    known = ~np.isnan(pairs)
    spread = (np.where(known, pairs, 0).sum(0) / np.maximum(known.sum(0), 1))[known.any(0)]
    # Resampling a few items, or equal ones, shows no uncertainty.
    certain = len(items) < metrics.FEW or not len(spread) or np.ptp(spread) < 1e-12
    return {
        "judge": judge_name,
        "items": len(items),
        "labels": steps,
        "mapped_by_rank": mapped,
        "alpha": _round(float(np.mean(defined)) if defined else None),
        "ci95": None if certain else metrics.interval(spread),
        "alpha_with": {name: _round(value) for name, value in each.items()},
        "alpha_among_raters": _round(alpha(list(common.values()))) if len(common) > 1 else None,
    }


def by_rank(values: Mapping[str, float], labels: Sequence[float]) -> dict[str, float]:
    """Maps values to labels in the same order and with the same shares. Equal values get the mean of their labels."""
    steps = np.sort(np.array(labels, float))
    raw = np.array(list(values.values()))
    _, place, count = np.unique(raw, return_inverse=True, return_counts=True)
    ends = np.cumsum(count) / len(raw) * len(steps)
    starts = ends - count / len(raw) * len(steps)
    area = np.concatenate([[0.0], np.cumsum(steps)])
    at = np.interp(np.stack([starts, ends]), np.arange(len(steps) + 1), area)
    means = (at[1] - at[0]) / (ends - starts)
    return {item: float(means[i]) for item, i in zip(values, place, strict=True)}


def oracle(name: str, count: int | None = None, device: str = "cpu") -> tuple[Ratings, dict[str, float]]:
    """True labels of pairs of renders (same, drifted, other), and an embedding judge's similarities of them."""
    from diptych.evaluate import suites
    from diptych.evaluate.scoring import curation, truth
    from diptych.judges.embedding import EmbeddingJudge

    suite = suites.load("pocket")
    if count is not None:
        suite = suite.model_copy(update={"check": suite.check.model_copy(update={"identities": count})})
    pairs = truth.check_pairs(suite, None)
    judge = EmbeddingJudge.load(name, "scorer", device)
    alike = curation.similarities(pairs.first, pairs.second, judge.embed)
    ids = [f"{t}-{i}" for t, i in zip(pairs.truth, pairs.identity, strict=True)]
    truths = {id: TRUTHS[t] for id, t in zip(ids, pairs.truth, strict=True)}
    return {"renderer": truths}, {id: float(v) for id, v in zip(ids, alike, strict=True)}


def format_check(result: dict[str, Any]) -> list[str]:
    """The lines that the command line prints for a result of `check`."""

    def shown(value: float | None) -> str:
        return "not defined: all values are equal" if value is None else f"{value:.2f}"

    low_high = "" if result["ci95"] is None else f"  95 % {result['ci95'][0]:.2f} to {result['ci95'][1]:.2f}"
    labels = ", ".join(f"{value:g}" for value in result["labels"])
    lines = [
        f"judge       {result['judge']}, {result['items']} items, labels {labels}",
        f"alpha       {shown(result['alpha'])}{low_high}",
    ]
    lines += [f"  with {name}: {shown(value)}" for name, value in result["alpha_with"].items()]
    if result["alpha_among_raters"] is not None:
        lines.append(f"among raters {shown(result['alpha_among_raters'])}")
    if result["mapped_by_rank"]:
        lines.append("the judge's values are on another scale and were mapped to the labels by rank")
    return [*lines, PUBLISHED]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
