"""Finds the seams between a grid's panels and cuts along them; says how sure it is that there is a seam at all.

A seam is a jump in colour that runs over the whole height. Outlines of things jump too, but over part of the height
only, and textures jump everywhere. So the image is averaged over sixteen bands of rows, and in each band the jump at
the cut is compared with the strongest one a few columns beside it:

    strength = mean over bands of (jump − 0.8 · strongest near) / (jump + 0.8 · strongest near)

1 is a clean seam, 0 a column about as strong as the strongest of its neighbours, and pictures without a seam lie well
below 0. Dark and pale grids count as much as colourful ones. The search runs at about 64 pixels a panel, whatever its
size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

WORK = 64  # pixels of a panel's side while searching
BANDS = 16  # bands of a panel's height that vote
NEAR = 5  # columns on either side that a seam is compared with
REACH = 1 / 16  # of a panel: how far from its even place a seam is looked for
OFF_CENTRE = 0.25  # an uneven cut must be this much stronger than the even one: renders have strong edges of their own
SLACK = 0.8  # puts 0 halfway between grids and single pictures of the pocket world (docs/data.md)
FLOOR = 1 / 255  # jumps below the last bit of 8 are none


@dataclass(frozen=True)
class Seam:
    """One cut. `axis` "x" is a vertical line before column `at`; `offset` is its distance from the even place."""

    axis: str
    at: int
    offset: int
    strength: float


@dataclass(frozen=True)
class Cut:
    """Panels in reading order, all of one size, and the seams they were cut at."""

    panels: list[Image]
    seams: list[Seam]

    @property
    def strength(self) -> float:
        """Of the weakest seam; infinite for a grid of one panel."""
        return min((seam.strength for seam in self.seams), default=float("inf"))

    def evidence(self) -> list[dict[str, Any]]:
        """The seams as plain values."""
        return [asdict(seam) | {"strength": round(seam.strength, 4)} for seam in self.seams]


def cut(image: Image, rows: int, cols: int, panel_size: int) -> Cut:
    """Cuts a grid of rows×cols panels at its seams. Always cuts; `Cut.strength` says whether there was anything to cut.

    Panels of an evenly divided grid are its very pixels; only those of an uneven cut are resized to `panel_size`.
    """
    from PIL import Image as PIL

    pixels = np.asarray(image.convert("RGB"))
    columns = _seams(pixels, cols, "x")
    lines = _seams(pixels.transpose(1, 0, 2), rows, "y")
    lefts = [0, *(seam.at for seam in columns), image.width]
    tops = [0, *(seam.at for seam in lines), image.height]
    panels = []
    for top, bottom in pairwise(tops):
        for left, right in pairwise(lefts):
            panel = image.crop((left, top, right, bottom))
            if panel.size != (panel_size, panel_size):
                panel = panel.resize((panel_size, panel_size), PIL.Resampling.LANCZOS)
            panels.append(panel)
    return Cut(panels, columns + lines)


def _seams(pixels: np.ndarray, parts: int, axis: str) -> list[Seam]:
    """The vertical seams that part pixels (H, W, 3) into `parts`."""
    return [find_seam(pixels, pixels.shape[1] * k // parts, pixels.shape[1] / parts, axis) for k in range(1, parts)]


def find_seam(pixels: np.ndarray, even: int, panel: float, axis: str = "x") -> Seam:
    """The vertical seam of pixels (H, W, 3), uint8, near column `even`; `panel` is a panel's width in pixels."""
    if len(pixels) < BANDS:
        return Seam(axis, even, 0, -1.0)  # too small to look at: no grid
    step = max(1, round(panel / WORK))
    small, first = _reduce(pixels, even, step)
    centre = (even - first) // step
    reach = max(1, round(panel * REACH / step))
    scores = {at: s for at in range(centre - reach, centre + reach + 1) if (s := _strength(small, at)) is not None}
    if centre not in scores:
        return Seam(axis, even, 0, -1.0)
    best = max(scores, key=lambda at: (scores[at], -abs(at - centre)))
    if best == centre or scores[best] - OFF_CENTRE <= scores[centre]:
        return Seam(axis, even, 0, float(scores[centre]))
    at = _sharpest(pixels, first + best * step, step)
    return Seam(axis, at, at - even, float(scores[best] - OFF_CENTRE))


def _reduce(pixels: np.ndarray, even: int, step: int) -> tuple[np.ndarray, int]:
    """Bands (BANDS, columns, 3) in 0..1, `step` pixels to a column, one of them beginning at `even`; and where the
    first begins."""
    height, width, _ = pixels.shape
    first = even % step
    count = (width - first) // step
    edges = np.linspace(0, height, BANDS + 1).round().astype(int)
    bands = np.add.reduceat(pixels, edges[:-1], axis=0, dtype=np.float32) / (255 * np.diff(edges)[:, None, None])
    bands = bands[:, first : first + count * step]
    return bands.reshape(BANDS, count, step, 3).mean(2), first


def _strength(bands: np.ndarray, at: int) -> float | None:
    """How much the jump before column `at` stands out; None if there are not enough columns beside it."""
    if at <= NEAR or at + NEAR >= bands.shape[1]:
        return None
    window = bands[:, at - NEAR - 1 : at + NEAR + 1]
    jumps = np.sqrt(((window[:, 1:] - window[:, :-1]) ** 2).sum(2))  # (BANDS, 2·NEAR + 1); the middle one is the cut's
    # The next column on either side is left out: a decoder smears a seam over two or three.
    near = np.delete(jumps, (NEAR - 1, NEAR, NEAR + 1), axis=1).max(1) * SLACK
    jump = jumps[:, NEAR]
    return float(((jump - near - FLOOR) / (jump + near + FLOOR)).mean())


def _sharpest(pixels: np.ndarray, near: int, step: int) -> int:
    """The column within `step` of `near` that the largest jump comes before."""
    low, high = max(1, near - step), min(pixels.shape[1] - 1, near + step)
    strip = pixels[:, low - 1 : high + 1].astype(np.float32)
    return low + int(np.abs(strip[:, 1:] - strip[:, :-1]).mean((0, 2)).argmax())
