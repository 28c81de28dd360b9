"""The scores as arithmetic on arrays: CP, PF, CP·PF, copy rate, their intervals, and paired comparison.

- CP, concept preservation: the scoring judge's similarity of reference and output. 0 is the mean over different
  identities of one kind, 1 the mean over one identity rendered again in another scene. Each image is capped at 1, so
  that no copy makes up for a miss. Only the mean is floored at 0: the similarity of one image is noisy, and flooring
  each image would reward a method that ignores the reference for its positive noise.
- PF, prompt following: the share of the prompt's attributes that the reader finds.
- CP·PF: mean CP × mean PF (as in DreamBench++).
- Copy rate: the share of outputs nearer to their reference than the nearest 1 % of true re-renders.

Intervals are at 95 % and over identities, since the prompts of one identity are not independent. They are percentile
bootstrap intervals, or Wilson's where resampling does not show the uncertainty: for shares (37 copies of 37 have
[0.91, 1]), for fewer than `FEW` identities, and where all identities score the same.

Where the true image is known, PSNR, SSIM (Wang et al. 2004) and a distance of features measure the error of an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

COPY_QUANTILE = 0.01
PERMUTATIONS = 10_000  # of the paired test, at least
FEW = 5  # fewer identities cannot be resampled in enough ways for a bootstrap interval
PAIRED = 6  # with fewer identities no paired permutation test reaches p < 0.05
Z = 1.959964  # two-sided 95 % quantile of the normal distribution
NAMES = ("cp", "pf", "cp_pf", "copy_rate")


@dataclass(frozen=True)
class Scale:
    """The scale of one split's scores, from renders."""

    zero: float  # mean similarity of different identities of one kind
    one: float  # mean similarity of one identity rendered again in another scene
    copy_distance: float  # an output with a smaller distance is a copy
    pairs: int  # identities that the scale was measured on

    def concept(self, similarity: np.ndarray) -> np.ndarray:
        """CP of each image (N,) from similarities (N,): at most 1, and negative for an image that is less similar than
        another subject. All values are 0 if the scale does not separate subjects."""
        if self.one - self.zero < 1e-9:
            return np.zeros_like(similarity)
        return np.minimum((similarity - self.zero) / (self.one - self.zero), 1.0)


def following(asked: Mapping[str, str], read: Mapping[str, str]) -> dict[str, bool]:
    """Whether the reader found each attribute's value; a group that the reader does not read counts as missed."""
    return {group: read.get(group) == value for group, value in asked.items()}


def copy_distances(references: Sequence[Image], outputs: Sequence[Image]) -> np.ndarray:
    """Distance (N,) in [0, 1] of each output, or of its mirror image, to its reference at the best alignment.

    Curation rejects near copies by the same distance (`stages.curate.alignment`): the mean absolute difference after
    shift, scale and a little brightness are undone.
    """
    from PIL import ImageOps

    from diptych.stages.curate.alignment import copy_distance

    best = [
        min(copy_distance(a, b).distance, copy_distance(a, ImageOps.mirror(b)).distance)
        for a, b in zip(references, outputs, strict=True)
    ]
    return np.array(best)


def copy_threshold(distances: np.ndarray) -> float:
    """The distance below which the nearest 1 % of true re-renders are."""
    return float(np.quantile(distances, COPY_QUANTILE))


@dataclass(frozen=True)
class ScoreArrays:
    """Scores of one method's outputs, arrays of (N,); `identity` is the number of each output's reference."""

    identity: np.ndarray
    cp: np.ndarray
    pf: np.ndarray
    copied: np.ndarray

    def of(self, chosen: np.ndarray) -> ScoreArrays:
        """The outputs where `chosen` (N,) is true."""
        return ScoreArrays(self.identity[chosen], self.cp[chosen], self.pf[chosen], self.copied[chosen])

    def means(self) -> dict[str, float]:
        """The four scores of `NAMES`. Negative means are 0."""
        cp, pf = max(0.0, float(self.cp.mean())), max(0.0, float(self.pf.mean()))
        return {"cp": cp, "pf": pf, "cp_pf": cp * pf, "copy_rate": float(self.copied.mean())}


def resample(identities: np.ndarray, times: int, seed: int = 0) -> np.ndarray:
    """How often each distinct identity occurs in each of `times` resamplings: (times, identities)."""
    count = len(np.unique(identities))
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=times)


def bootstrap(outcome: ScoreArrays, counts: np.ndarray) -> dict[str, np.ndarray]:
    """The four scores in each resampling, (times,) each."""
    means = [resampled_mean(outcome.identity, values, counts) for values in _columns(outcome)]
    return _scores(np.stack(means, 1))


def _by_identity(identity: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values (N,) of each distinct identity."""
    _, place = np.unique(identity, return_inverse=True)
    return np.bincount(place, weights=values.astype(float)), np.bincount(place)


def resampled_mean(identity: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of `values` (N,) in each resampling of their identities: (times,)."""
    sums, sizes = _by_identity(identity, values)
    return (counts @ sums) / (counts @ sizes)


def mean_of(
    identity: np.ndarray, values: np.ndarray, times: int, bounds: tuple[float, float]
) -> tuple[float, list[float]]:
    """The mean of a score within `bounds`, and its 95 % interval over identities."""
    if resamples(identity, values):
        ends = interval(resampled_mean(identity, values, resample(identity, times)))
    else:
        ends = bounded(values.mean(), len(np.unique(identity)), bounds)
    return round(float(values.mean()), 4), ends


def bounded(mean: float, n: int, bounds: tuple[float, float]) -> list[float]:
    """`wilson` for the mean of `n` values between two bounds."""
    low, high = bounds
    ends = wilson(min(max((float(mean) - low) / (high - low), 0.0), 1.0), n)
    return [round(low + (high - low) * end, 4) for end in ends]


def resamples(identity: np.ndarray, values: np.ndarray) -> bool:
    """Whether a bootstrap over identities shows the uncertainty: there are enough, and they do not all score the
    same."""
    sums, sizes = _by_identity(identity, values)
    return len(sizes) >= FEW and float(np.ptp(sums / sizes)) > 1e-12


def interval(values: np.ndarray) -> list[float]:
    """The 95 % percentile interval."""
    return [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))]


def wilson(share: float, n: float) -> list[float]:
    """Wilson's 95 % interval of a share of `n` independent trials. It is conservative for the mean of any score from 0
    to 1, since none varies more than one that is 0 or 1."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * np.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    low = 0.0 if share <= 0 else max(0.0, middle - half)
    high = 1.0 if share >= 1 else min(1.0, middle + half)
    return [round(float(low), 4), round(float(high), 4)]


def share_interval(identity: np.ndarray, hits: np.ndarray) -> list[float]:
    """Wilson's 95 % interval of a share of booleans (N,). Booleans of one identity may be dependent, so the number of
    trials follows from the variance between identities; it is at least the number of identities."""
    sums, sizes = _by_identity(identity, hits)
    share, count, identities = float(hits.mean()), len(hits), len(sizes)
    trials = float(identities)
    if 0 < share < 1 and identities > 1:
        between = float(((sums - share * sizes) ** 2).sum()) * identities / (identities - 1) / count**2
        trials = min(max(share * (1 - share) / between, identities), count) if between > 0 else count
    return wilson(share, trials)


def intervals(
    outcomes: Sequence[ScoreArrays], means: Mapping[str, float], spread: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The 95 % interval of each score of `NAMES` over outcomes of the same samples (trainings of several seeds, or
    one). `means` are the scores, and `spread` has them in each resampling."""
    count = len(np.unique(outcomes[0].identity))
    ends = {name: interval(spread[name]) for name in NAMES}
    for name in ("cp", "pf"):
        each = [np.divide(*_by_identity(outcome.identity, getattr(outcome, name))) for outcome in outcomes]
        if count < FEW or np.ptp(each) < 1e-12:
            ends[name] = wilson(min(max(means[name], 0.0), 1.0), count)
    if count < FEW or np.ptp(spread["cp_pf"]) == 0:
        ends["cp_pf"] = [round(cp * pf, 4) for cp, pf in zip(ends["cp"], ends["pf"], strict=True)]
    identity, copied = (np.concatenate([getattr(x, key) for x in outcomes]) for key in ("identity", "copied"))
    ends["copy_rate"] = share_interval(identity, copied)
    return ends


def difference_interval(
    gap: float, spread: np.ndarray, one: tuple[float, Sequence[float]], other: tuple[float, Sequence[float]], count: int
) -> list[float]:
    """The 95 % interval of a paired difference over `count` identities, which is `spread` in each resampling.

    Where resampling shows no uncertainty, it is Newcombe's unpaired interval from `one` and `other`, which are (score,
    interval) each.
    """
    if count >= FEW and (gap == 0 or np.ptp(spread) > 0):
        return interval(spread)
    (a, (a_low, a_high)), (b, (b_low, b_high)) = one, other
    low, high = np.hypot(a - a_low, b_high - b), np.hypot(a_high - a, b - b_low)
    return [round(float(gap - low), 4), round(float(gap + high), 4)]


def summary(outcome: ScoreArrays, times: int) -> dict[str, Any]:
    """The four scores, `n` and `ci95`, as in metrics.json."""
    spread, means = bootstrap(outcome, resample(outcome.identity, times)), outcome.means()
    scores = {name: round(value, 4) for name, value in means.items()}
    return {**scores, "n": len(outcome.cp), "ci95": intervals([outcome], means, spread)}


def compare(a: ScoreArrays, b: ScoreArrays, times: int, name: str = "cp_pf") -> dict[str, Any]:
    """`a` minus `b` on the same samples: difference, ratio, 95 % interval, two-sided p-value, whether the two intervals
    are apart, and the number of `identities`.

    Both are resampled together, so that the difficulty of an identity cancels. The p-value is that of a permutation
    test that exchanges the two methods within each identity at random.
    """
    assert np.array_equal(a.identity, b.identity), "only outputs for the same samples can be compared"
    counts, count = resample(a.identity, times), len(np.unique(a.identity))
    first, second = bootstrap(a, counts), bootstrap(b, counts)
    mine, theirs = a.means(), b.means()
    ours, others = intervals([a], mine, first)[name], intervals([b], theirs, second)[name]
    gap, base = mine[name] - theirs[name], theirs[name]
    between = first[name] - second[name]
    return {
        "score": name,
        "difference": round(gap, 4),
        "ratio": round(mine[name] / base, 4) if base > 0 else None,
        "ci95": difference_interval(gap, between, (mine[name], ours), (base, others), count),
        "p": round(permuted(a, b, name, max(times, PERMUTATIONS)), 5),
        "intervals_apart": ours[0] > others[1] or others[0] > ours[1],
        "n": len(a.cp),
        "identities": count,
    }


def format_p(compared: Mapping[str, Any], digits: int = 3, identities: int | None = None) -> str:
    """A comparison's p-value in words: `= 0.042`, `< 0.001`, or that there are too few identities for a test."""
    count = compared.get("identities", identities)
    if count is not None and count < PAIRED:
        return "not tested: too few subjects"
    least = 10**-digits
    return f"< {least:g}" if compared["p"] < least else f"= {compared['p']:.{digits}f}"


def permuted(a: ScoreArrays, b: ScoreArrays, name: str, times: int, seed: int = 0) -> float:
    """The two-sided p-value of `a` and `b` being exchangeable within each identity: the share of random exchanges,
    including the true labels, whose difference of the score is at least as large."""
    sums = [np.stack([_by_identity(x.identity, values)[0] for values in _columns(x)]) for x in (a, b)]
    count = sums[0].shape[1]
    if 2**count <= times:  # every possible exchange, once
        swap = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    else:
        swap = np.random.default_rng(seed).integers(0, 2, (times, count))
        swap[0] = 0
    kept, moved = 1 - swap, swap
    of_a, of_b = ((kept @ mine.T + moved @ others.T) / len(a.identity) for mine, others in (sums, sums[::-1]))
    gaps = np.abs(_scores(of_a)[name] - _scores(of_b)[name])
    return float((gaps >= gaps[0] - 1e-12).mean())


def _columns(outcome: ScoreArrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return outcome.cp, outcome.pf, outcome.copied


def _scores(means: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of `NAMES`, (times,) each, from means (times, 3) of `_columns`."""
    cp, pf = np.maximum(means[:, 0], 0.0), np.maximum(means[:, 1], 0.0)
    return {"cp": cp, "pf": pf, "cp_pf": cp * pf, "copy_rate": means[:, 2]}


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that a random positive scores above a random negative (ties count half)."""
    ordered = np.sort(negative)
    below, up_to = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(positive) * len(negative)))


# ---- images compared with the true image; arrays are (N, H, W, 3), float in 0..1

BEST_PSNR = 60.0  # decibels of equal images, so that a mean stays finite
WINDOW, SIGMA = 11, 1.5  # pixels, as in the paper of SSIM
C1, C2 = 0.01**2, 0.03**2


def arrays(images: Sequence[Image]) -> np.ndarray:
    """PIL images of one size as float64 (N, H, W, 3) in 0..1."""
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in images])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio (N,) in decibels, at most `BEST_PSNR`."""
    error = ((a - b) ** 2).mean((1, 2, 3))
    return np.minimum(-10 * np.log10(np.maximum(error, 1e-12)), BEST_PSNR)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (N,), 1 for equal images (Wang et al. 2004), as the mean of the three color channels.

    Only windows inside the image count, as in the authors' code. ValueError below 11 pixels a side.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs a window of {WINDOW} pixels, but the images have {a.shape[1]}×{a.shape[2]}")
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a, var_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    both = _smooth(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * both + C2) / (var_a + var_b + C2)
    return (luminance * structure).mean((1, 2, 3))


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """Gaussian windows (N, H, W, C) → (N, H − 10, W − 10, C)."""
    weights = np.exp(-0.5 * (np.arange(WINDOW) - WINDOW // 2) ** 2 / SIGMA**2)
    weights /= weights.sum()
    for axis in (1, 2):
        pixels = np.lib.stride_tricks.sliding_window_view(pixels, WINDOW, axis) @ weights  # pyright: ignore
    return pixels


def feature_distance(judge: Any, a: Sequence[Image], b: Sequence[Image]) -> np.ndarray:
    """Distance (N,) of pairs of images in an embedding judge's feature maps, 0 for equal images.

    LPIPS without its learned weights (Zhang et al. 2018): at each stage of the network the features of each position
    are scaled to length 1, and their squared difference is averaged over positions. The distance is the mean over
    stages.
    """
    import torch

    distances: list[np.ndarray] = []
    for one, two in zip(judge.vision.batches(a), judge.vision.batches(b), strict=True):
        maps = [
            judge.vision.model(pixel_values=pixels, output_hidden_states=True).hidden_states for pixels in (one, two)
        ]
        stages = []
        for first, second in zip(*maps, strict=True):
            # (B, positions, C) of a transformer, or (B, C, h, w) of a convolutional network.
            axis = 1 if first.ndim == 4 else 2
            first, second = (torch.nn.functional.normalize(x.float(), dim=axis) for x in (first, second))
            stages.append(((first - second) ** 2).sum(axis).flatten(1).mean(1))
        distances.append(torch.stack(stages).mean(0).cpu().numpy())
    return np.concatenate(distances)
