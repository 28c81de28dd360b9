"""The audit of a run: people look at a sample of its pairs, and say how far the judge's decisions can be trusted.

    sample = draw("runs/first", 200, seed=0)
    report(sample, [labels.read("runs/first/audit/labels.jsonl")], wanted=0.95)

The population is what reached the judge's decision: a pair refused as a copy or for its cut says nothing about the
judge. Half of the sample comes from the kept and half from the refused pairs, on each side four times as densely in the
quarter nearest to the threshold as in the farther half. The sizes of the strata are known, so estimates are weighted
back. A pair is drawn by the hash of its id, so a larger sample holds the smaller one, and shards do not matter.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.apps import precision
from diptych.apps.precision import Estimate, Labelled, Measured, Stratum
from diptych.data import records
from diptych.data.funnel import UNDECIDED, reached_judge
from diptych.data.labels import LABELS
from diptych.data.scan import batches, open_run, row
from diptych.data.store import Dataset
from diptych.errors import UserError

# A side's quarter nearest to the threshold, the quarter after it, and the rest; and their shares of the side's sample.
BANDS = {"near": (0.0, 0.25, 0.5), "middle": (0.25, 0.5, 0.25), "far": (0.5, 1.0, 0.25)}
SMALL = ("id", "grid_id", "reference_panel", "target_panel", "similarity", "kept", "reason")


@dataclass(frozen=True)
class Drawn:
    """A pair of the sample."""

    id: str
    subject: str
    shard: int
    number: int  # of its row in the shard
    stratum: int
    similarity: float
    above: int  # pairs of its stratum whose similarity is at least this one's


@dataclass(frozen=True)
class Band:
    """A stratum and how many of it are drawn."""

    name: str
    kept: bool
    size: int
    low: float  # NaN where there are no numbers
    high: float
    drawn: int


@dataclass(frozen=True)
class Sample:
    """What is looked at, in the order in which it is shown."""

    run: Path
    threshold: float
    question: str  # the task's own, for the labeller
    seed: int
    asked: int
    left_out: int  # candidate rows that never reached the judge's decision
    bands: tuple[Band, ...]
    pairs: tuple[Drawn, ...]

    @property
    def population(self) -> int:
        """Pairs the sample stands for: two panels of one grid, in whichever order."""
        return sum(band.size for band in self.bands)

    def picture(self, id: str, side: str) -> bytes:
        """The stored bytes of a sampled pair's `reference` or `target`. KeyError for an id that was not drawn."""
        pair = {pair.id: pair for pair in self.pairs}[id]
        column = {"reference": "conditioning", "target": "image"}[side]
        return row(Dataset(self.run / "candidates"), pair.shard, pair.number, column)[column]["bytes"] or b""


def draw(run_dir: str | Path, size: int, seed: int) -> Sample:
    """A stratified sample of at most `size` pairs. UsageError if there is no run, UserError if nothing was judged.

    Reads small columns once; holds some 40 bytes for each pair of the population.
    """
    folder, recipe, task = open_run(run_dir)
    threshold = task.thresholds(recipe.curate.thresholds).same
    candidates = Dataset(folder / "candidates")
    population = _population(candidates, seed)
    if not len(population.keys):
        raise UserError(
            f"{folder} has no pair that a judge decided on; first: diptych curate {folder}/recipe.yaml --out {folder}"
        )
    members = _strata(population, threshold)
    counts = allocate(size, [len(rows) for _, _, rows in members], [_weight(name) for name, _, _ in members])
    bands, chosen = [], []
    for stratum, ((name, kept, rows), count) in enumerate(zip(members, counts, strict=True)):
        numbers = np.sort(population.similarity[rows])
        known = name != UNDECIDED
        low, high = (float(numbers[0]), float(numbers[-1])) if known else (np.nan, np.nan)
        bands.append(Band(name, kept, len(rows), low, high, count))
        for index in rows[np.argsort(population.keys[rows], kind="stable")[:count]]:
            similarity = float(population.similarity[index]) if known else np.nan
            above = len(numbers) - int(np.searchsorted(numbers, similarity)) if known else 0
            chosen.append((int(population.keys[index]), int(index), stratum, similarity, above))
    pairs = []
    for _, index, stratum, similarity, above in sorted(chosen):
        shard, number = int(population.shard[index]), int(population.number[index])
        names = row(candidates, shard, number, "id", "subject")
        pairs.append(Drawn(names["id"], names["subject"], shard, number, stratum, similarity, above))
    question = task.curation.questions[-1]
    return Sample(folder, threshold, question, seed, size, population.left_out, tuple(bands), tuple(pairs))


@dataclass(frozen=True)
class _Population:
    """Arrays (N,) over the pairs that reached the judge."""

    similarity: np.ndarray
    kept: np.ndarray
    undecided: np.ndarray
    keys: np.ndarray  # random, from the seed and the id
    shard: np.ndarray
    number: np.ndarray
    left_out: int


def _population(candidates: Dataset, seed: int) -> _Population:
    similarity, keys, shards, numbers = array("d"), array("q"), array("q"), array("q")
    kept, undecided = bytearray(), bytearray()
    left_out, grid, seen = 0, None, set()
    for shard, start, batch in batches(candidates, *SMALL):
        for offset, (id, of, a, b, number, keep, reason) in enumerate(zip(*batch.values(), strict=True)):
            if not reached_judge(reason):
                left_out += 1
                continue
            if of != grid:  # the rows of a grid stand together
                grid, seen = of, set()
            # Both orders of two panels are one look; unless the judge decided on each order by itself.
            look = (min(a, b), max(a, b), str(number), keep)
            if look in seen:
                continue
            seen.add(look)
            unknown = number is None or number != number or reason.startswith(UNDECIDED)
            similarity.append(0.0 if number is None or unknown else number)
            undecided.append(unknown)
            kept.append(keep)
            keys.append(records.seed_of(seed, id, "audit"))
            shards.append(shard)
            numbers.append(start + offset)
    flags = [np.frombuffer(bytes(flag), dtype=bool) for flag in (kept, undecided)]
    places = np.array(keys), np.array(shards), np.array(numbers)
    return _Population(np.array(similarity), flags[0], flags[1], *places, left_out)


def _strata(population: _Population, threshold: float) -> list[tuple[str, bool, np.ndarray]]:
    """Name, verdict and members (indices) of each stratum that is not empty."""
    found = []
    for kept in (True, False):
        side = np.flatnonzero((population.kept == kept) & ~population.undecided)
        distance = np.abs(population.similarity[side] - threshold)
        bounds = {share: float(np.quantile(distance, share)) for share in (0.25, 0.5)} if len(side) else {}
        for name, (start, end, _) in BANDS.items():
            inside = (distance > bounds.get(start, -1.0)) & (distance <= bounds.get(end, np.inf))
            found.append((name, kept, side[inside]))
    found.append((UNDECIDED, False, np.flatnonzero(population.undecided)))
    return [(name, kept, rows) for name, kept, rows in found if len(rows)]


def _weight(name: str) -> float:
    return BANDS[name][2] if name in BANDS else 0.25


def allocate(size: int, sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many to draw of each stratum: by `weights`, one at a time where most are missing, never more than there are.

    Raising `size` never lowers any of them.
    """
    counts = [0] * len(sizes)
    for _ in range(min(size, sum(sizes))):
        open_ = [i for i, count in enumerate(counts) if count < sizes[i]]
        counts[max(open_, key=lambda i: (weights[i] / (counts[i] + 0.5), -i))] += 1
    return counts


# ---- what the labels say


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
    threshold = precision.threshold_for(strata, wanted)
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
        "threshold": {"same": sample.threshold, **_estimate(precision.estimate(strata, sample.seed))},
        "wanted": {
            "precision": wanted,
            "threshold": None
            if threshold is None
            else {
                # Down, so that the pair the threshold was taken from is kept.
                "same": float(np.floor(threshold * 1e6) / 1e6),
                **_estimate(precision.estimate(precision.at(strata, threshold), sample.seed)),
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
                agree, kappa = precision.kappa([people[a][id] for id in both], [people[b][id] for id in both])
                rounded = None if kappa is None else round(kappa, 4)
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
        kappa = "not defined, both said one thing only" if row_["kappa"] is None else f"{row_['kappa']:.3f}"
        text.append(
            f"agreement   {row_['a']} and {row_['b']}: {100 * row_['agree']:.1f} % of {row_['pairs']}, kappa {kappa}"
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
