"""How good curation is, where the truth is known, and what that says about the run's own pairs.

On *rendered* pairs: a subject beside the same one, beside one with some attributes drawn anew (`world.drift`, the way a
teacher's panels disagree), and beside another of its kind, each passed through the teacher's VAE and blurred. Precision
and recall follow for every threshold of the judge. On the run's *own* grids nobody knows the truth: the keep rate is
counted, and the attribute reader, which never took part in curation, estimates the precision, corrected for its own
error on the renders (Rogan & Gladen 1978).
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
from diptych.evaluate.scoring.metrics import auc

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.data.records import Thresholds
    from diptych.evaluate.suites import Prior

ENOUGH = 0.95  # the precision that `threshold_for` looks for
JUDGED = 300  # of the run's own pairs, read by the attribute reader
TRUTHS = ("same", "drifted", "other")
Embed = Callable[[Sequence["Image"]], np.ndarray]


@dataclass(frozen=True)
class Curve:
    """Precision and recall at each threshold (keep where similarity >= threshold), thresholds falling."""

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    def at(self, threshold: float) -> tuple[float | None, float]:
        """Precision and recall of keeping what is at least `threshold`. Keeping nothing has no precision."""
        kept = np.flatnonzero(self.threshold >= threshold)
        if not len(kept):
            return None, 0.0
        return float(self.precision[kept[-1]]), float(self.recall[kept[-1]])

    def threshold_for(self, precision: float = ENOUGH) -> float | None:
        """The threshold that keeps the most at no less than `precision`; None if there is none."""
        good = np.flatnonzero(self.precision >= precision)
        return float(self.threshold[good[-1]]) if len(good) else None


def curve(similarity: np.ndarray, same: np.ndarray, weight: np.ndarray) -> Curve:
    """Precision and recall over all thresholds of pairs (N,), each counting `weight`."""
    order = np.argsort(-similarity, kind="stable")
    s, good, w = similarity[order], same[order].astype(float), weight[order]
    kept, right = np.cumsum(w), np.cumsum(w * good)
    last = np.flatnonzero(np.append(s[1:] != s[:-1], True))  # equal similarities are kept together
    return Curve(s[last], (right / kept)[last], (right / right[-1])[last])


@dataclass(frozen=True)
class RenderedPairs:
    """Rendered pairs, as a teacher would show them: first and second panel, the truth, and how much each counts."""

    first: list[Image]
    second: list[Image]
    truth: list[str]
    weight: np.ndarray
    identity: np.ndarray  # number of the first panel's subject

    @property
    def same(self) -> np.ndarray:
        return np.array([t == "same" for t in self.truth])


def weigh(truth: Sequence[str], prior: Prior) -> np.ndarray:
    """Weights (N,) that give each truth its share of the prior, whatever its number."""
    shares = {"same": prior.same, "drifted": prior.drifted, "other": prior.other}
    count = {t: max(1, list(truth).count(t)) for t in shares}
    return np.array([shares[t] / count[t] for t in truth])


def on_renders(pairs: RenderedPairs, embed: Embed, thresholds: Thresholds) -> dict[str, Any]:
    """The judge on pairs whose truth is known: precision and recall at the recipe's threshold, and the whole curve."""
    similarity = similarities(pairs.first, pairs.second, embed)
    found = curve(similarity, pairs.same, pairs.weight)
    precision, recall = found.at(thresholds.same)
    best = found.threshold_for()
    keep = np.linspace(0, len(found.threshold) - 1, min(80, len(found.threshold))).round().astype(int)
    return {
        "pairs": len(pairs.truth),
        "truth": {t: pairs.truth.count(t) for t in TRUTHS},
        "prior": {t: round(float(pairs.weight[[x == t for x in pairs.truth]].sum()), 4) for t in TRUTHS},
        "threshold": thresholds.same,
        "precision": None if precision is None else round(precision, 4),
        "recall": round(recall, 4),
        "auc": {t: round(_auc_of(pairs, similarity, t), 4) for t in TRUTHS[1:] if t in pairs.truth},
        "threshold_for_95": None if best is None else round(best, 4),
        "recall_at_95": None if best is None else round(found.at(best)[1], 4),
        "curve": [
            [round(float(found.threshold[i]), 4), round(float(found.precision[i]), 4), round(float(found.recall[i]), 4)]
            for i in keep
        ],
        "similarity": {t: _quantiles(similarity[[x == t for x in pairs.truth]]) for t in TRUTHS if t in pairs.truth},
    }


def similarities(first: Sequence[Image], second: Sequence[Image], embed: Embed) -> np.ndarray:
    """Cosine similarities (N,) of pictures, by L2-normalised embeddings."""
    if not len(first):
        return np.zeros(0)
    return (embed(first) * embed(second)).sum(1)


def _auc_of(pairs: RenderedPairs, similarity: np.ndarray, against: str) -> float:
    return auc(similarity[pairs.same], similarity[[t == against for t in pairs.truth]])


def _quantiles(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))]


@dataclass(frozen=True)
class Witness:
    """The attribute reader as a witness of identity: it says "same" from `threshold` on, with these errors."""

    threshold: float
    hit: float  # share of true same pairs it calls same
    false_alarm: float  # share of the others it calls same

    def corrected(self, observed: float) -> float | None:
        """The true share behind an observed share of "same"; None if the witness is no better than a coin."""
        if self.hit - self.false_alarm < 0.1:
            return None
        return float(np.clip((observed - self.false_alarm) / (self.hit - self.false_alarm), 0, 1))


def witness(pairs: RenderedPairs, identify: Embed) -> Witness:
    """The reader's best threshold (hit rate minus false alarms) on half of the identities; its errors on the rest."""
    similarity = similarities(pairs.first, pairs.second, identify)
    same, weight = pairs.same, pairs.weight
    order = np.random.default_rng(0).permutation(int(pairs.identity.max()) + 1)
    chooses = order[pairs.identity] % 2 == 0

    def rates(threshold: float, among: np.ndarray) -> tuple[float, float]:
        said = weight * (similarity >= threshold)
        hit, alarm = (said[part].sum() / weight[part].sum() for part in (among & same, among & ~same))
        return float(hit), float(alarm)

    def gain(threshold: float) -> float:
        hit, alarm = rates(threshold, chooses)
        return hit - alarm

    best = max(np.unique(similarity[chooses]).tolist(), key=gain)
    return Witness(best, *rates(best, ~chooses))


def on_grids(run_dir: Path, identify: Embed, reader: Witness) -> dict[str, Any] | None:
    """The run's own candidates: keep rate, and the reader's estimate of how many kept pairs show one subject."""
    candidates = Dataset(run_dir / "candidates")
    if not candidates.shards():
        return None
    reasons: Counter[str] = Counter()
    for batch in selected(run_dir):
        reasons.update(batch["reason"])
    kept, total = reasons["kept"], reasons.total()
    result: dict[str, Any] = {"candidates": total, "kept": kept, "reasons": dict(reasons)}
    result["keep_rate"] = round(kept / total, 4) if total else None
    columns = candidates.columns("id", "reference_panel", "target_panel")
    # Both orders of a grid hold the same two pictures: one of them is enough.
    once = [row["id"] for row in columns if row["reference_panel"] < row["target_panel"]]
    places = np.linspace(0, len(once) - 1, min(JUDGED, len(once))).round().astype(int)
    chosen = {once[i] for i in places}
    first, second, keeps = _pictures(candidates, chosen)
    called = similarities(first, second, identify) >= reader.threshold
    keeps = np.array(keeps, dtype=bool)
    result["reader"] = {
        "pairs": len(keeps),
        "threshold": round(reader.threshold, 4),
        "hit_rate": round(reader.hit, 4),
        "false_alarm_rate": round(reader.false_alarm, 4),
        "all": _estimate(called, reader),
        "kept": _estimate(called[keeps], reader),
        "rejected": _estimate(called[~keeps], reader),
    }
    return result


def _estimate(called: np.ndarray, reader: Witness) -> dict[str, Any] | None:
    """Share called the same subject, as seen and corrected, with a 95 % interval of the correction."""
    if not len(called):
        return None
    rng = np.random.default_rng(0)
    # Jeffreys' interval of the observed share; it stays honest where none or all were called the same.
    yes, no = called.sum() + 0.5, (~called).sum() + 0.5
    spread = [reader.corrected(float(x)) for x in rng.beta(yes, no, 2000)]
    known = [x for x in spread if x is not None]
    corrected = reader.corrected(float(called.mean()))
    return {
        "n": len(called),
        "called_same": round(float(called.mean()), 4),
        "corrected": None if corrected is None else round(corrected, 4),
        "ci95": [round(float(v), 4) for v in np.quantile(known, (0.025, 0.975))] if known else None,
    }


def _pictures(candidates: Dataset, chosen: set[str]) -> tuple[list[Image], list[Image], list[bool]]:
    from diptych.data.images import open_image

    first, second, kept = [], [], []
    for row in candidates if chosen else ():
        if row["id"] in chosen:
            first.append(open_image(row["conditioning"]))
            second.append(open_image(row["image"]))
            kept.append(row["kept"])
    return first, second, kept
