"""How far a judge agrees with people, or with an oracle: Krippendorff's alpha, as DreamBench++ reports it.

Ratings are JSON lines `{"id": …, "rater": …, "value": …}`; a value is a number, in the labels' own steps (0 to 4, or
"same" and "different"). The judge's values are one more rater's. Values on another scale than the labels (a cosine) are
first put onto it by their ranks, so that as many items get each label as the people gave; the result says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import UsageError, UserError
from diptych.evaluate.scoring import metrics
from diptych.utils.documents import parse_json, read_lines

Ratings = dict[str, dict[str, float]]  # rater → id → value
WORDS = {"different": 0.0, "same": 1.0}
PUBLISHED = (
    "published agreement with people, CP: GPT-4o .50, DreamSim .42, DINO .31, CLIP-I .14; PF: GPT-4o .55, VQAScore .50 "
    "(other pictures, other people: a hint and no limit)"
)
TRUTHS = {"same": 4.0, "drifted": 2.0, "other": 0.0}  # what the rubric's scale says of a pair of renders
RESAMPLED = 1000


def alpha(ratings: Sequence[Mapping[str, float]]) -> float | None:
    """Krippendorff's alpha of interval data: 1 − observed / expected disagreement over items with two values or more.

    None where it is not defined: no such item, or all values equal. (Krippendorff, Content Analysis, 2004, ch. 11.)
    """
    items = sorted({item for rater in ratings for item in rater})
    found = _alphas(_sums(ratings, items), np.ones((1, len(items))))[0]
    return None if np.isnan(found) else float(found)


def _sums(ratings: Sequence[Mapping[str, float]], items: Sequence[str]) -> np.ndarray:
    """Of each item's values: how many, their sum, the sum of their squares: (3, items). Zeros if it has one."""
    table = np.array([[rater.get(item, np.nan) for item in items] for rater in ratings]).reshape(len(ratings), -1)
    sums = np.stack([np.sum(~np.isnan(table), 0), np.nansum(table, 0), np.nansum(table**2, 0)]).astype(float)
    return np.where(sums[0] > 1, sums, 0.0)


def _alphas(sums: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Alpha where item i counts `times[k, i]` times: (k,); NaN where it is not defined."""
    n, s, q = sums
    # The squared differences of all ordered pairs of n values sum to 2 (n Σx² − (Σx)²).
    within = times @ (2 * (n * q - s**2) / np.maximum(n - 1, 1))
    m, total, squares = times @ n, times @ s, times @ q
    with np.errstate(divide="ignore", invalid="ignore"):
        between = 2 * (m * squares - total**2) / (m - 1)
        return np.where((m > 1) & (between > 1e-9), 1 - within / between, np.nan)


def read_ratings(path: Path) -> Ratings:
    """A ratings file, or the labels that `diptych data audit` wrote. UsageError names the line that is neither."""
    found: Ratings = {}
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
            raise UsageError(f"{path} line {number}: not a rating {{id, rater, value}}") from error
        found.setdefault(rater, {})[item] = value
    if not found:
        raise UsageError(f"{path}: holds no ratings; one JSON object a line: {{id, rater, value}}")
    return found


def read_scores(folder: Path, score: str) -> dict[str, float]:
    """A judge's values from an evaluation: METHOD/ID → `score` (cp, pf, cp_debiased, clip_i, …)."""
    path = folder / "samples" / "scores.jsonl"
    try:
        lines = [parse_json(line) for line in path.read_text("utf8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); first: diptych evaluate --suite …") from error
    found = {f"{line['method']}/{line['id']}": float(line[score]) for line in lines if line.get(score) is not None}
    if not found:
        known = sorted({key for line in lines for key, value in line.items() if isinstance(value, float)})
        raise UsageError(f"{path} has no score '{score}'; it has {', '.join(known) or 'none'}")
    return found


def read_similarities(run: Path) -> dict[str, float]:
    """The curating judge's similarities of a run's candidates, by the pair's id."""
    from diptych.data.store import Dataset

    rows = Dataset(run / "candidates").columns("id", "similarity")
    return {row["id"]: row["similarity"] for row in rows if row["similarity"] == row["similarity"]}


def check(labels: Ratings, judge: Mapping[str, float], judge_name: str) -> dict[str, Any]:
    """The judge's agreement with each rater and with all of them, and theirs with each other, beside it.

    As published, the headline is the mean of alpha over the raters; its interval resamples items.
    """
    items = sorted(set(judge) & {item for rater in labels.values() for item in rater})
    if len(items) < 2:
        raise UsageError(
            f"the judge's items and the labels' have {len(items)} in common; ids of an evaluation are METHOD/ID"
        )
    steps = sorted({value for rater in labels.values() for value in rater.values()})
    own = {item: judge[item] for item in items}
    mapped = not set(own.values()) <= set(steps)
    if mapped:
        own = by_rank(own, [rater[item] for item in items for rater in labels.values() if item in rater])
    kept = {name: {item: rater[item] for item in items if item in rater} for name, rater in labels.items()}
    each = {name: alpha([own, rater]) for name, rater in kept.items() if rater}
    mean = _mean(list(each.values()))
    draws = np.random.default_rng(0).multinomial(len(items), np.full(len(items), 1 / len(items)), RESAMPLED)
    pairs = np.stack([_alphas(_sums([own, rater], items), draws) for rater in kept.values() if rater])
    known = ~np.isnan(pairs)
    spread = (np.where(known, pairs, 0).sum(0) / np.maximum(known.sum(0), 1))[known.any(0)]
    if len(items) < metrics.FEW or not len(spread) or np.ptp(spread) < 1e-12:
        spread = spread[:0]  # resampling a few items, or equal ones, shows no uncertainty
    return {
        "judge": judge_name,
        "items": len(items),
        "labels": steps,
        "mapped_by_rank": mapped,
        "alpha": _round(mean),
        "ci95": [round(float(v), 4) for v in np.quantile(spread, (0.025, 0.975))] if len(spread) else None,
        "alpha_with": {name: _round(value) for name, value in each.items()},
        "alpha_among_raters": _round(alpha(list(kept.values()))) if len(kept) > 1 else None,
    }


def by_rank(values: Mapping[str, float], labels: Sequence[float]) -> dict[str, float]:
    """Values as labels of the same order: the lowest share of them gets the lowest label, and so on; equal values get
    the mean of the labels that fall to them."""
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
    """Pairs of renders whose truth is known (same, drifted, other), and an embedding judge's similarities of them."""
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


def lines(found: dict[str, Any]) -> list[str]:
    """A check for people."""
    low_high = "" if found["ci95"] is None else f"  95 % {found['ci95'][0]:.2f} to {found['ci95'][1]:.2f}"
    told = [
        f"judge       {found['judge']}, {found['items']} items, labels {', '.join(f'{v:g}' for v in found['labels'])}",
        f"alpha       {_said(found['alpha'])}{low_high}",
    ]
    told += [f"  with {name}: {_said(value)}" for name, value in found["alpha_with"].items()]
    if found["alpha_among_raters"] is not None:
        told.append(f"among raters {_said(found['alpha_among_raters'])}")
    if found["mapped_by_rank"]:
        told.append("the judge's values are on a scale of their own: they were put onto the labels by rank")
    return [*told, PUBLISHED]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _said(value: float | None) -> str:
    return "not defined: all values are equal" if value is None else f"{value:.2f}"
