"""Results of an audit: precision and recall of a threshold with 95 % intervals, and the agreement of labelers.

    report(sample, [labels.read("runs/first/audit/labels.jsonl")], wanted=0.95)

The judge's number divides the population into strata of known size. Only the number of same-subject pairs in a stratum
is estimated, from its labeled share. Jeffreys' Beta(½, ½) prior for each stratum and a binomial for the pairs without a
label give the intervals; their width is 0 when every pair has a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.data.labels import LABELS

if TYPE_CHECKING:
    from diptych.apps.audit import AuditSample

DRAWS = 4000


@dataclass(frozen=True)
class Labelled:
    """A labeled pair."""

    similarity: float  # NaN if the judge gave none
    same: bool
    above: int  # pairs of its stratum, labeled or not, whose similarity is at least this one's


@dataclass(frozen=True)
class Stratum:
    """Pairs of one verdict in one range of similarity. The ranges of strata are disjoint."""

    kept: bool
    size: int  # pairs in it, labeled or not
    low: float  # their lowest similarity; NaN for pairs without a number
    labelled: tuple[Labelled, ...] = field(default=())

    @property
    def same(self) -> int:
        """Number of pairs labeled `same`."""
        return sum(pair.same for pair in self.labelled)


@dataclass(frozen=True)
class Share:
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """Precision and recall of accepting the kept strata; None where labels are missing."""

    precision: Share | None  # share of the accepted pairs that are the same subject
    recall: Share | None  # share of all same-subject pairs that are accepted


def estimate(strata: Sequence[Stratum], seed: int = 0) -> Estimate:
    """Estimates precision and recall. A stratum without labels uses the labels of the other strata of its verdict."""
    rng = np.random.default_rng(seed)
    points, draws = [], []
    for stratum in strata:
        count, same = len(stratum.labelled), stratum.same
        if not count:
            side = [other for other in strata if other.kept == stratum.kept]
            borrowed, of = sum(other.same for other in side), sum(len(other.labelled) for other in side)
            if not of:
                points.append(np.nan)
                draws.append(np.full(DRAWS, np.nan))
                continue
            rate, chance = borrowed / of, rng.beta(borrowed + 0.5, of - borrowed + 0.5, DRAWS)
        else:
            rate, chance = same / count, rng.beta(same + 0.5, count - same + 0.5, DRAWS)
        points.append(rate * stratum.size)
        draws.append(same + rng.binomial(stratum.size - count, chance))
    keeps = np.array([stratum.kept for stratum in strata], dtype=bool)
    sizes = np.array([stratum.size for stratum in strata], dtype=float)
    point, simulated = np.array(points), np.array(draws).reshape(len(strata), DRAWS)

    def share(part: float, whole: float, parts: np.ndarray, wholes: np.ndarray) -> Share | None:
        if not whole > 0:  # NaN too
            return None
        spread = np.divide(parts, wholes, out=np.zeros(DRAWS), where=wholes > 0)
        low, high = np.quantile(spread, (0.025, 0.975))
        value = part / whole
        return Share(value, min(float(low), value), max(float(high), value))

    same_kept, same_kept_simulated = float(point[keeps].sum()), simulated[keeps].sum(0)
    kept = float(sizes[keeps].sum())
    precision = None
    if not np.isnan(same_kept):
        precision = share(same_kept, kept, same_kept_simulated, np.full(DRAWS, kept))
    return Estimate(precision, share(same_kept, float(point.sum()), same_kept_simulated, simulated.sum(0)))


def at(strata: Sequence[Stratum], threshold: float) -> list[Stratum]:
    """Returns the strata of another threshold, the similarity of a labeled pair, which cuts one stratum in two.

    `estimate` handles a part without labels.
    """
    cut: list[Stratum] = []
    for stratum in strata:
        if np.isnan(stratum.low):
            cut.append(replace(stratum, kept=False))
            continue
        above = [pair for pair in stratum.labelled if pair.similarity >= threshold]
        below = [pair for pair in stratum.labelled if pair.similarity < threshold]
        whole = stratum.size if stratum.low >= threshold else 0
        size = next((pair.above for pair in above if pair.similarity == threshold), whole)
        cut.append(replace(stratum, kept=True, size=size, labelled=tuple(above)))
        cut.append(replace(stratum, kept=False, size=stratum.size - size, labelled=tuple(below)))
    return [stratum for stratum in cut if stratum.size]


def threshold_for(strata: Sequence[Stratum], wanted: float) -> float | None:
    """Returns the lowest threshold whose precision is at least `wanted`; None if there is none."""
    tried = {pair.similarity for stratum in strata for pair in stratum.labelled if not np.isnan(pair.similarity)}
    for threshold in sorted(tried):
        parts = [part for part in at(strata, threshold) if part.kept]
        rates = [part.same / len(part.labelled) if part.labelled else None for part in parts]
        labelled = sum(len(part.labelled) for part in parts)
        middle = sum(part.same for part in parts) / labelled
        same = sum(part.size * (middle if rate is None else rate) for part, rate in zip(parts, rates, strict=True))
        if same >= wanted * sum(part.size for part in parts) - 1e-9:
            return threshold
    return None


def kappa(first: Sequence[str], second: Sequence[str]) -> tuple[float, float | None]:
    """Returns the share of equal labels and Cohen's kappa of two labelers on the same pairs (at least one).

    Kappa is None if both gave a single label throughout, since chance alone would agree as well.
    """
    assert len(first) == len(second) > 0
    n = len(first)
    agree = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum((first.count(label) / n) * (second.count(label) / n) for label in set(first) | set(second))
    return agree, (agree - chance) / (1 - chance) if chance < 1 else None


def report(sample: AuditSample, files: Sequence[dict[str, dict[str, str]]], wanted: float = 0.95) -> dict[str, Any]:
    """Returns precision and recall of the run's threshold, the threshold for a precision of `wanted`, and agreement.

    `files` has one `{labeler: {id: label}}` for each labels file; with several labelers the majority decides.
    """
    people = _people(files)
    truth, unsure, disputed = _truth(sample, people)
    strata = [
        Stratum(
            band.kept,
            band.size,
            band.low,
            tuple(
                Labelled(pair.similarity, truth[pair.id], pair.above)
                for pair in sample.pairs
                if pair.stratum == number and pair.id in truth
            ),
        )
        for number, band in enumerate(sample.bands)
    ]
    sampled = {pair.id for pair in sample.pairs}
    threshold = threshold_for(strata, wanted)
    return {
        "run": str(sample.run),
        "sample": {"asked": sample.asked, "drawn": len(sample.pairs), "seed": sample.seed},
        "population": {"pairs": sample.population, "rows_left_out": sample.left_out},
        "strata": [
            {
                "verdict": "kept" if band.kept else "refused",
                "name": band.name,
                "low": _round(band.low),
                "high": _round(band.high),
                "pairs": band.size,
                "drawn": band.sampled,
                "labelled": len(stratum.labelled),
                "same": stratum.same,
            }
            for band, stratum in zip(sample.bands, strata, strict=True)
        ],
        "labels": {
            "by": {
                who: {label: list(given.values()).count(label) for label in LABELS} for who, given in people.items()
            },
            "used": len(truth),
            "unsure": unsure,
            "disputed": disputed,
            "missing": len(sampled) - len(truth) - unsure - disputed,
            "outside": len({id for given in people.values() for id in given} - sampled),
        },
        "threshold": {"same": sample.threshold, **_estimate(estimate(strata, sample.seed))},
        "wanted": {
            "precision": wanted,
            "threshold": None
            if threshold is None
            else {
                # Rounded down, so that the threshold accepts the pair it was taken from.
                "same": float(np.floor(threshold * 1e6) / 1e6),
                **_estimate(estimate(at(strata, threshold), sample.seed)),
            },
        },
        "agreement": _agreement(people, sampled),
    }


def _people(files: Sequence[dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    """`{name: {id: label}}`. One name in two files counts as two people."""
    people: dict[str, dict[str, str]] = {}
    for number, file in enumerate(files, 1):
        for name, given in file.items():
            people[name if name not in people else f"{name} (file {number})"] = given
    return people


def _truth(sample: AuditSample, people: dict[str, dict[str, str]]) -> tuple[dict[str, bool], int, int]:
    """`{id: same}` of pairs with a majority, and the numbers of unsure and disputed pairs."""
    truth, unsure, disputed = {}, 0, 0
    for pair in sample.pairs:
        given = [labels[pair.id] for labels in people.values() if pair.id in labels]
        same, different = given.count("same"), given.count("different")
        if same != different:
            truth[pair.id] = same > different
        elif same:
            disputed += 1
        elif given:
            unsure += 1
    return truth, unsure, disputed


def _agreement(people: dict[str, dict[str, str]], sampled: set[str]) -> list[dict[str, Any]]:
    """Agreement of every two labelers on the sampled pairs that both labeled."""
    rows = []
    for a, b in combinations(people, 2):
        both = sorted(people[a].keys() & people[b].keys() & sampled)
        if both:
            agree, corrected = kappa([people[a][id] for id in both], [people[b][id] for id in both])
            rounded = None if corrected is None else round(corrected, 4)
            rows.append({"a": a, "b": b, "pairs": len(both), "agree": round(agree, 4), "kappa": rounded})
    return rows


def _estimate(result: Estimate) -> dict[str, Any]:
    def as_json(share: Share | None) -> dict[str, Any] | None:
        if share is None:
            return None
        return {"value": round(share.value, 4), "ci95": [round(share.low, 4), round(share.high, 4)]}

    return {"precision": as_json(result.precision), "recall": as_json(result.recall)}


def _round(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def format_report(result: dict[str, Any]) -> list[str]:
    """Returns the lines of text of a `report`."""
    size, labels, wanted = result["population"], result["labels"], result["wanted"]
    text = [
        f"sample      {result['sample']['drawn']} of the {size['pairs']} pairs that reached the judge, seed "
        f"{result['sample']['seed']} ({size['rows_left_out']} rows were rejected before it)"
    ]
    for who, counts in labels["by"].items():
        text.append(f"labels      {who}: " + ", ".join(f"{n} {label}" for label, n in counts.items()))
    left = [f"{labels[key]} {key}" for key in ("unsure", "disputed", "missing", "outside") if labels[key]]
    text.append(f"used        {labels['used']}" + (f" ({', '.join(left)})" if left else ""))
    text.append(f"{'':<12}{'similarity':<20}{'pairs':>8}{'sampled':>8}{'labeled':>10}{'same':>6}")
    for row in result["strata"]:
        between = "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        verdict = "accepted" if row["verdict"] == "kept" else "rejected"
        text.append(
            f"  {verdict:<8}  {between:<20}{row['pairs']:>8}{row['drawn']:>8}"
            f"{row['labelled']:>10}{row['same']:>6}  {row['name']}"
        )
    text.append(f"now         same {result['threshold']['same']:g}: {_format_estimate(result['threshold'])}")
    better = wanted["threshold"]
    if better is None:
        text.append(f"wanted      precision {wanted['precision']:g}: no threshold reaches it with these labels")
    else:
        text.append(f"wanted      precision {wanted['precision']:g}: same {better['same']}: {_format_estimate(better)}")
    for row in result["agreement"]:
        shown = "not defined: both gave a single label" if row["kappa"] is None else f"{row['kappa']:.3f}"
        text.append(
            f"agreement   {row['a']} and {row['b']}: {100 * row['agree']:.1f} % of {row['pairs']}, kappa {shown}"
        )
    return text


def _format_estimate(estimate: dict[str, Any]) -> str:
    parts = []
    for name in ("precision", "recall"):
        share = estimate[name]
        if share is None:
            parts.append(f"{name} unknown")
        else:
            parts.append(f"{name} {share['value']:.3f} [{share['ci95'][0]:.3f}, {share['ci95'][1]:.3f}]")
    return ", ".join(parts)
