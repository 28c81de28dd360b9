"""Precision and recall of curation on renders, and an estimate for the run's pairs.

The truth is known for *rendered* pairs: a subject with itself, with a copy that has some attributes sampled again
(`world.drift`, the way a teacher's panels disagree), and with another of its kind. Each goes through the teacher's VAE
and a blur. Precision and recall follow for every threshold of the judge. The truth of the run's *grids* is unknown. The
share of accepted pairs is counted, and the attribute reader, which takes no part in curation, estimates the precision.
That estimate is corrected for the reader's errors on the renders (Rogan & Gladen 1978).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.data.scan import selected
from diptych.data.store import Dataset
from diptych.evaluate.scoring.metrics import auc, interval

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.evaluate.suites import Prior
    from diptych.recipe.schema import Thresholds

ENOUGH = 0.95  # default precision of `threshold_for`
JUDGED = 300  # pairs of the run that the attribute reader compares
TRUTHS = ("same", "drifted", "other")
Embed = Callable[[Sequence["Image"]], np.ndarray]


@dataclass(frozen=True)
class Curve:
    """Precision and recall at each threshold (accept if similarity >= threshold), in falling order of thresholds."""

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    def at(self, threshold: float) -> tuple[float | None, float]:
        """Precision and recall at a threshold. The precision is None if no pair is accepted."""
        accepted = np.flatnonzero(self.threshold >= threshold)
        if not len(accepted):
            return None, 0.0
        return float(self.precision[accepted[-1]]), float(self.recall[accepted[-1]])

    def threshold_for(self, precision: float = ENOUGH) -> float | None:
        """The threshold that accepts most pairs with at least this precision; None if there is none."""
        good = np.flatnonzero(self.precision >= precision)
        return float(self.threshold[good[-1]]) if len(good) else None


def curve(similarity: np.ndarray, same: np.ndarray, weight: np.ndarray) -> Curve:
    """Precision and recall over all thresholds of pairs (N,), each counting `weight`."""
    order = np.argsort(-similarity, kind="stable")
    s, good, w = similarity[order], same[order].astype(float), weight[order]
    accepted, right = np.cumsum(w), np.cumsum(w * good)
    last = np.flatnonzero(np.append(s[1:] != s[:-1], True))  # equal similarities are accepted together
    return Curve(s[last], (right / accepted)[last], (right / right[-1])[last])


@dataclass(frozen=True)
class RenderedPairs:
    """Rendered pairs as a teacher would show them: first and second panel, the truth, and the weight of each."""

    first: list[Image]
    second: list[Image]
    truth: list[str]
    weight: np.ndarray
    identity: np.ndarray  # number of the first panel's subject

    @property
    def same(self) -> np.ndarray:
        return self.of("same")

    def of(self, truth: str) -> np.ndarray:
        """Which pairs (N,) have this truth."""
        return np.array([t == truth for t in self.truth], dtype=bool)


def weigh(truth: Sequence[str], prior: Prior) -> np.ndarray:
    """Weights (N,) that give each truth its share of the prior, whatever the number of its pairs."""
    shares = {"same": prior.same, "drifted": prior.drifted, "other": prior.other}
    count = {t: max(1, list(truth).count(t)) for t in shares}
    return np.array([shares[t] / count[t] for t in truth])


def on_renders(pairs: RenderedPairs, embed: Embed, thresholds: Thresholds) -> dict[str, Any]:
    """The judge on pairs of known truth: precision and recall at the recipe's threshold, and the whole curve."""
    similarity = similarities(pairs.first, pairs.second, embed)
    measured = curve(similarity, pairs.same, pairs.weight)
    precision, recall = measured.at(thresholds.same)
    best = measured.threshold_for()
    places = np.linspace(0, len(measured.threshold) - 1, min(80, len(measured.threshold))).round().astype(int)
    points = np.stack([measured.threshold, measured.precision, measured.recall], 1)[places]
    by_truth = {t: similarity[pairs.of(t)] for t in TRUTHS if t in pairs.truth}
    return {
        "pairs": len(pairs.truth),
        "truth": {t: pairs.truth.count(t) for t in TRUTHS},
        "prior": {t: round(float(pairs.weight[pairs.of(t)].sum()), 4) for t in TRUTHS},
        "threshold": thresholds.same,
        "precision": None if precision is None else round(precision, 4),
        "recall": round(recall, 4),
        "auc": {t: round(auc(by_truth["same"], values), 4) for t, values in by_truth.items() if t != "same"},
        "threshold_for_95": None if best is None else round(best, 4),
        "recall_at_95": None if best is None else round(measured.at(best)[1], 4),
        "curve": [[round(float(value), 4) for value in point] for point in points],
        "similarity": {
            t: [round(float(v), 4) for v in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))]
            for t, values in by_truth.items()
        },
    }


def similarities(first: Sequence[Image], second: Sequence[Image], embed: Embed) -> np.ndarray:
    """Cosine similarities (N,) of images, from L2-normalized embeddings."""
    return (embed(first) * embed(second)).sum(1) if len(first) else np.zeros(0)


@dataclass(frozen=True)
class Witness:
    """The attribute reader as a classifier of identity: "same" from `threshold` on, with these error rates."""

    threshold: float
    hit: float  # share of same pairs that it classifies as same
    false_alarm: float  # share of other pairs that it classifies as same

    def corrected(self, observed: float) -> float | None:
        """The true share behind an observed share of "same"; None if the classifier is hardly better than chance."""
        if self.hit - self.false_alarm < 0.1:
            return None
        return float(np.clip((observed - self.false_alarm) / (self.hit - self.false_alarm), 0, 1))


def witness(pairs: RenderedPairs, identify: Embed) -> Witness:
    """The reader's best threshold (hit rate minus false alarm rate) on half of the identities, and its error rates on
    the rest."""
    similarity = similarities(pairs.first, pairs.second, identify)
    same, weight = pairs.same, pairs.weight
    order = np.random.default_rng(0).permutation(int(pairs.identity.max()) + 1)
    chooses = order[pairs.identity] % 2 == 0

    def rates(threshold: float, among: np.ndarray) -> tuple[float, float]:
        called = weight * (similarity >= threshold)
        hit, alarm = (called[part].sum() / weight[part].sum() for part in (among & same, among & ~same))
        return float(hit), float(alarm)

    def gain(threshold: float) -> float:
        hit, alarm = rates(threshold, chooses)
        return hit - alarm

    best = max(np.unique(similarity[chooses]).tolist(), key=gain)
    return Witness(best, *rates(best, ~chooses))


def on_grids(run_dir: Path, identify: Embed, reader: Witness) -> dict[str, Any] | None:
    """The run's candidates: share of accepted pairs, and the reader's estimate of how many pairs show one subject.

    None if the run has no candidates.
    """
    candidates = Dataset(run_dir / "candidates")
    if not candidates.shards():
        return None
    reasons: Counter[str] = Counter()
    for batch in selected(run_dir):
        reasons.update(batch["reason"])
    accepted, total = reasons["kept"], reasons.total()
    result: dict[str, Any] = {"candidates": total, "kept": accepted, "reasons": dict(reasons)}
    result["keep_rate"] = round(accepted / total, 4) if total else None
    columns = candidates.columns("id", "reference_panel", "target_panel")
    # Both orders of a grid have the same two images, so one of them is enough.
    once = [row["id"] for row in columns if row["reference_panel"] < row["target_panel"]]
    places = np.linspace(0, len(once) - 1, min(JUDGED, len(once))).round().astype(int)
    first, second, kept = _images(candidates, {once[i] for i in places})
    called = similarities(first, second, identify) >= reader.threshold
    result["reader"] = {
        "pairs": len(kept),
        "threshold": round(reader.threshold, 4),
        "hit_rate": round(reader.hit, 4),
        "false_alarm_rate": round(reader.false_alarm, 4),
        "all": _estimate(called, reader),
        "kept": _estimate(called[kept], reader),
        "rejected": _estimate(called[~kept], reader),
    }
    return result


def _estimate(called: np.ndarray, reader: Witness) -> dict[str, Any] | None:
    """Share of pairs classified as the same subject, observed and corrected, with a 95 % interval of the latter."""
    if not len(called):
        return None
    rng = np.random.default_rng(0)
    # Jeffreys' interval of the observed share, which also holds for shares of 0 and 1.
    yes, no = called.sum() + 0.5, (~called).sum() + 0.5
    known = [x for share in rng.beta(yes, no, 2000) if (x := reader.corrected(float(share))) is not None]
    corrected = reader.corrected(float(called.mean()))
    return {
        "n": len(called),
        "called_same": round(float(called.mean()), 4),
        "corrected": None if corrected is None else round(corrected, 4),
        "ci95": interval(np.array(known)) if known else None,
    }


def _images(candidates: Dataset, chosen: set[str]) -> tuple[list[Image], list[Image], np.ndarray]:
    """The panels of the chosen candidates, and which of them (N,) were accepted."""
    from diptych.data.images import open_image

    first, second, kept = [], [], []
    for row in candidates if chosen else ():
        if row["id"] in chosen:
            first.append(open_image(row["conditioning"]))
            second.append(open_image(row["image"]))
            kept.append(row["kept"])
    return first, second, np.array(kept, dtype=bool)
