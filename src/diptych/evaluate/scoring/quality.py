"""What CP and PF do not see: whether an image shows this one subject of its kind, and whether it is a clean image.

- *Identity retrieval* (`retrieved`): the share of images that are nearest to their own reference among the references
  of `GALLERY` subjects. Chance is 0.1.
- *Trait transfer* (`traits`): the share of the subject's named traits that the attribute reader finds in the image.
  Only the pocket world knows them. Compare it with `truth`, which also has the reader's mistakes.
- *Sharpness* (`sharpness`): the mean absolute Laplacian of the brightness. Blur lowers it, and specks raise it above
  that of `truth`.
- *Kernel distance* (`kid`, Bińkowski et al. 2018, eq. 4): the squared maximum mean discrepancy of two sets of images
  in a model's features. 0 means that the sets look alike; an unbiased estimate may be slightly negative. The pocket
  suite takes the statistics of the reader's first feature maps, because its last features are trained to ignore blur
  and specks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.data.images import open_image
from diptych.data.store import Dataset
from diptych.evaluate.scoring import metrics
from diptych.evaluate.suites import MAIN, Split

if TYPE_CHECKING:
    from PIL.Image import Image

GALLERY = 10  # references among which an image must find its own
LAPLACIAN = (0.0, 1020.0)  # bounds of the sharpness
Features = Callable[[Sequence["Image"]], np.ndarray]


def retrieved(similarity: float, rivals: np.ndarray) -> bool:
    """Whether an image is more similar to its own reference than to each of the others, `rivals` (N,)."""
    return bool(similarity > rivals.max())


def traits(true: Mapping[str, str], read: Mapping[str, str]) -> dict[str, bool]:
    """Whether the reader found each of the subject's traits. Traits that the reader does not know are left out."""
    return {group: read[group] == value for group, value in true.items() if group in read}


def sharpness(image: Image) -> float:
    """The mean absolute Laplacian of the brightness, in levels of 255 (4 neighbors, borders left out)."""
    y = np.asarray(image.convert("L"), np.float32)
    inner = y[1:-1, 1:-1]
    return float(np.abs(4 * inner - y[:-2, 1:-1] - y[2:, 1:-1] - y[1:-1, :-2] - y[1:-1, 2:]).mean())


def kernel_distance(first: np.ndarray, second: np.ndarray, groups: np.ndarray) -> tuple[float, list[float]]:
    """The kernel distance of features (N, D) to features (M, D), and its 95 % interval.

    Features are standardized by the second set, and the kernel is (x·y / D + 1)³. The interval is a jackknife over the
    `groups` (N,) of the first set, since images of one subject are not independent. ValueError for fewer than two
    images or groups.
    """
    if len(first) < 2 or len(second) < 2 or len(np.unique(groups)) < 2:
        raise ValueError("a kernel distance needs two images and two groups")
    middle, spread = second.mean(0), second.std(0) + 1e-12
    first, second = (first - middle) / spread, (second - middle) / spread

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, xy, yy = kernel(first, first), kernel(first, second), kernel(second, second)
    np.fill_diagonal(xx, 0)
    m = len(second)
    within = (yy.sum() - np.trace(yy)) / (m * (m - 1))

    def distance(total: float, cross: float, n: int) -> float:
        return total / (n * (n - 1)) - 2 * cross / (n * m) + within

    n = len(first)
    value = distance(xx.sum(), xy.sum(), n)
    left_out = []
    for group in np.unique(groups):
        out = groups == group
        rest = n - int(out.sum())
        if rest > 1:
            total = xx.sum() - 2 * xx[out].sum() + xx[np.ix_(out, out)].sum()
            left_out.append(distance(total, xy.sum() - xy[out].sum(), rest))
    each = np.array(left_out)
    half = metrics.Z * np.sqrt((len(each) - 1) / len(each) * ((each - each.mean()) ** 2).sum()) if len(each) else 0.0
    return round(float(value), 4), [round(float(value - half), 4), round(float(value + half), 4)]


def add_kernel_distances(
    result: dict[str, Any], out: Path, features: Features, like: Callable[[Split], Sequence[Image]]
) -> None:
    """Adds `kid` to each method and anchor of a result, by split: its images against the images `like(split)`."""
    main = {**result["methods"], **result["anchors"]}
    splits: dict[Split, dict[str, Any]] = {MAIN: main}
    splits |= {split: {**by["methods"], **by["anchors"]} for split, by in result["splits"].items()}
    real = {split: features(like(split)) for split in splits}
    for name in main:
        rows = list(Dataset(out / "samples" / name))
        for split, by in splits.items():
            chosen = [row for row in rows if row["split"] == split]
            groups = np.array([row["identity"] for row in chosen])
            if name in by and len(np.unique(groups)) > 1:
                made = features([open_image(row["image"]) for row in chosen])
                by[name]["kid"], by[name]["ci95"]["kid"] = kernel_distance(made, real[split], groups)
