"""What the labels of an audit say: precision and recall of a threshold, with 95 % intervals; agreement of labellers.

    report(sample, [labels.read("runs/first/audit/labels.jsonl")], wanted=0.95)

The population is cut into strata by the judge's number, so its sizes are known exactly; only how many pairs of a
stratum are the same subject is estimated, from the labelled share of it. Jeffreys' Beta(½, ½) prior for each stratum
and a binomial for the pairs nobody labelled give the intervals; they close when everything is labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.data.labels import LABELS

if TYPE_CHECKING:
    from diptych.apps.audit import Sample

DRAWS = 4000


@dataclass(frozen=True)
class Labelled:
    """A labelled pair."""

    similarity: float  # NaN where the judge gave none
    same: bool
    above: int  # pairs of its stratum, labelled or not, whose similarity is at least this one's


@dataclass(frozen=True)
class Stratum:
    """Pairs of one verdict, in one range of similarity (disjoint from the other strata's)."""

    kept: bool
    size: int  # pairs in it, labelled or not
    low: float  # their least similarity; NaN for pairs without a number
    labelled: tuple[Labelled, ...] = field(default=())

    @property
    def same(self) -> int:
        """Pairs labelled the same."""
        return sum(pair.same for pair in self.labelled)


@dataclass(frozen=True)
class Measured:
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What keeping the kept strata means; None where no label can say it."""

    precision: Measured | None  # share of the kept pairs that are the same subject
    recall: Measured | None  # share of all same-subject pairs that are kept


def estimate(strata: Sequence[Stratum], seed: int = 0) -> Estimate:
    """Precision and recall of the strata's own `kept`. A stratum without labels goes by the labelled of its side."""
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
    point, drawn = np.array(points), np.array(draws).reshape(len(strata), DRAWS)

    def share(part: float, whole: float, parts: np.ndarray, wholes: np.ndarray) -> Measured | None:
        if not whole > 0:  # NaN too
            return None
        spread = np.divide(parts, wholes, out=np.zeros(DRAWS), where=wholes > 0)
        low, high = np.quantile(spread, (0.025, 0.975))
        value = part / whole
        return Measured(value, min(float(low), value), max(float(high), value))

    same_kept, same_kept_drawn = float(point[keeps].sum()), drawn[keeps].sum(0)
    kept = float(sizes[keeps].sum())
    precision = None
    if not np.isnan(same_kept):
        precision = share(same_kept, kept, same_kept_drawn, np.full(DRAWS, kept))
    return Estimate(precision, share(same_kept, float(point.sum()), same_kept_drawn, drawn.sum(0)))


def at(strata: Sequence[Stratum], threshold: float) -> list[Stratum]:
    """The strata of another threshold, which must be the similarity of a labelled pair: the one it falls into is cut.

    A part without labels keeps the others of its new side to go by, see `estimate`.
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
    """The least similarity whose precision is `wanted` or more: it keeps as much as it can. None if there is none."""
    tried = {pair.similarity for stratum in strata for pair in stratum.labelled if not np.isnan(pair.similarity)}
    for threshold in sorted(tried):
        parts = [part for part in at(strata, threshold) if part.kept]
        rates = [part.same / len(part.labelled) if part.labelled else None for part in parts]
        labelled = sum(len(part.labelled) for part in parts)
        middle = sum(part.same for part in parts) / labelled
        found = sum(part.size * (middle if rate is None else rate) for part, rate in zip(parts, rates, strict=True))
        if found >= wanted * sum(part.size for part in parts) - 1e-9:
            return threshold
    return None


def kappa(first: Sequence[str], second: Sequence[str]) -> tuple[float, float | None]:
    """Share of equal labels and Cohen's kappa of two labellers on the same pairs (at least one).

    Kappa is None where both gave one and the same label throughout: chance alone would agree as well.
    """
    assert len(first) == len(second) > 0
    n = len(first)
    agree = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum((first.count(label) / n) * (second.count(label) / n) for label in set(first) | set(second))
    return agree, (agree - chance) / (1 - chance) if chance < 1 else None


def report(sample: Sample, given: Sequence[dict[str, dict[str, str]]], wanted: float = 0.95) -> dict[str, Any]:
    """Precision and recall of the run's threshold, the threshold for a precision of `wanted`, agreement; plain values.

    `given` is one `{labeller: {id: label}}` for each labels file; of several labellers the majority holds.
    """
    people = _people(given)
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
    drawn = {pair.id for pair in sample.pairs}
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
                "drawn": band.drawn,
                "labelled": len(stratum.labelled),
                "same": stratum.same,
            }
            for band, stratum in zip(sample.bands, strata, strict=True)
        ],
        "labels": {
            "by": {who: {label: list(said.values()).count(label) for label in LABELS} for who, said in people.items()},
            "used": len(truth),
            "unsure": unsure,
            "disputed": disputed,
            "missing": len(drawn) - len(truth) - unsure - disputed,
            "outside": len({id for said in people.values() for id in said} - drawn),
        },
        "threshold": {"same": sample.threshold, **_estimate(estimate(strata, sample.seed))},
        "wanted": {
            "precision": wanted,
            "threshold": None
            if threshold is None
            else {
                # Down, so that the pair the threshold was taken from is kept.
                "same": float(np.floor(threshold * 1e6) / 1e6),
                **_estimate(estimate(at(strata, threshold), sample.seed)),
            },
        },
        "agreement": _agreement(people, drawn),
    }


def _people(given: Sequence[dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    """`{name: {id: label}}`; one name in two files is two people."""
    people: dict[str, dict[str, str]] = {}
    for number, file in enumerate(given, 1):
        for name, said in file.items():
            people[name if name not in people else f"{name} (file {number})"] = said
    return people


def _truth(sample: Sample, people: dict[str, dict[str, str]]) -> tuple[dict[str, bool], int, int]:
    """`{id: same}` where a majority says one or the other; how many are unsure, how many disputed."""
    truth, unsure, disputed = {}, 0, 0
    for pair in sample.pairs:
        said = [labels[pair.id] for labels in people.values() if pair.id in labels]
        same, different = said.count("same"), said.count("different")
        if same != different:
            truth[pair.id] = same > different
        elif same:
            disputed += 1
        elif said:
            unsure += 1
    return truth, unsure, disputed


def _agreement(people: dict[str, dict[str, str]], drawn: set[str]) -> list[dict[str, Any]]:
    """Every two labellers on the pairs of the sample that both labelled."""
    names, found = list(people), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = sorted(people[a].keys() & people[b].keys() & drawn)
            if both:
                agree, corrected = kappa([people[a][id] for id in both], [people[b][id] for id in both])
                rounded = None if corrected is None else round(corrected, 4)
                found.append({"a": a, "b": b, "pairs": len(both), "agree": round(agree, 4), "kappa": rounded})
    return found


def _estimate(found: Estimate) -> dict[str, Any]:
    def share(measured: Measured | None) -> dict[str, Any] | None:
        if measured is None:
            return None
        return {"value": round(measured.value, 4), "ci95": [round(measured.low, 4), round(measured.high, 4)]}

    return {"precision": share(found.precision), "recall": share(found.recall)}


def _round(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def lines(found: dict[str, Any]) -> list[str]:
    """What `report` found, for people."""
    size, labels, wanted = found["population"], found["labels"], found["wanted"]
    text = [
        f"sample      {found['sample']['drawn']} of the {size['pairs']} pairs that reached the judge, seed "
        f"{found['sample']['seed']} ({size['rows_left_out']} rows were refused before it)"
    ]
    for who, counts in labels["by"].items():
        text.append(f"labels      {who}: " + ", ".join(f"{n} {label}" for label, n in counts.items()))
    left = [f"{labels[key]} {key}" for key in ("unsure", "disputed", "missing", "outside") if labels[key]]
    text.append(f"used        {labels['used']}" + (f" ({', '.join(left)})" if left else ""))
    text.append(f"{'':<12}{'similarity':<20}{'pairs':>8}{'drawn':>8}{'labelled':>10}{'same':>6}")
    for row_ in found["strata"]:
        between = "–" if row_["low"] is None else f"{row_['low']:.3f} to {row_['high']:.3f}"
        text.append(
            f"  {row_['verdict']:<8}  {between:<20}{row_['pairs']:>8}{row_['drawn']:>8}"
            f"{row_['labelled']:>10}{row_['same']:>6}  {row_['name']}"
        )
    text.append(f"now         same {found['threshold']['same']:g}: {_said(found['threshold'])}")
    better = wanted["threshold"]
    if better is None:
        text.append(f"wanted      precision {wanted['precision']:g}: no threshold reaches it by these labels")
    else:
        text.append(f"wanted      precision {wanted['precision']:g}: same {better['same']}: {_said(better)}")
    for row_ in found["agreement"]:
        shown = "not defined, both said one thing only" if row_["kappa"] is None else f"{row_['kappa']:.3f}"
        text.append(
            f"agreement   {row_['a']} and {row_['b']}: {100 * row_['agree']:.1f} % of {row_['pairs']}, kappa {shown}"
        )
    return text


def _said(estimate: dict[str, Any]) -> str:
    parts = []
    for name in ("precision", "recall"):
        share = estimate[name]
        if share is None:
            parts.append(f"{name} not known yet")
        else:
            parts.append(f"{name} {share['value']:.3f} [{share['ci95'][0]:.3f}, {share['ci95'][1]:.3f}]")
    return ", ".join(parts)
