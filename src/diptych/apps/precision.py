"""Precision and recall of a threshold from a stratified sample of human labels, with 95 % intervals; agreement of two.

The population is cut into strata by the judge's number, so its sizes are known exactly; only how many pairs of a
stratum are the same subject is estimated, from the labelled share of it. Jeffreys' Beta(½, ½) prior for each stratum
and a binomial for the pairs nobody labelled give the intervals; they close when everything is labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

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
