"""Compares two panels pixel by pixel after aligning them: whether the target is a copy, and whether panels align.

`copy_distance` detects copies, from which a student would learn to copy. It is the mean difference of two panels after
a small shift, a small change of scale and a small change of brightness are undone. The others are for tasks whose
panels show one scene (relight). `structural_shift` is the distance between the outlines of two panels, independent of
the light, and `structural_fit` also detects a change of scale. `whole_change` is the change of the image as a whole,
which a new light causes and a new hat does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FINE, COARSE = 64, 32  # pixels of a panel's side in the last and the first search
REACH = 1 / 8  # maximum shift that is undone, in panels
SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)
FINE_SCALE = 0.025
MARGIN = 0.04  # by how much the match at another scale must be better
CELLS = 8  # cells of a panel's side for the change of the whole image
GAIN = 0.08  # maximum change of brightness that is undone; a new light changes more
_BOX, _BILINEAR = 4, 2  # Pillow's resampling filters; only callers with an image import Pillow


@dataclass(frozen=True)
class Alignment:
    """The best alignment of two panels.

    `distance` is their mean absolute difference, 0..1, at this shift (x, y, in panels), scale and gain.
    """

    distance: float
    shift: tuple[float, float]
    scale: float
    gain: float

    def evidence(self) -> dict[str, Any]:
        """Return plain values."""
        return {key: np.round(value, 4).tolist() for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Structure:
    """The alignment of two panels' outlines.

    `shift` is their distance in panels, and `match` their correlation there, 1 at best. `scale` is the magnification of
    the second panel.
    """

    shift: float
    match: float
    scale: float = 1.0

    def evidence(self) -> dict[str, Any]:
        """Return plain values."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def copy_distance(a: Image, b: Image) -> Alignment:
    """Return the difference of two panels at their best alignment; 0 is a copy.

    The middle three quarters of `a` are searched in `b` at every shift up to `REACH` and every scale, first at 32
    pixels. At 64 pixels, the search continues around the best result, and around the best result at scale 1, because
    most copies are not zoomed. Both orders of a pair give almost the same number.
    """
    a, b = (image.convert("RGB").resize((FINE, FINE), _BOX) for image in (a, b))
    margin = round(COARSE * REACH)
    center = _middle(_pixels(a, COARSE), margin)
    best_at: dict[float, tuple[float, tuple[int, int]]] = {}
    for scale in SCALES:
        errors = _squared_errors(center, _scaled(b, COARSE, scale), margin)
        y, x = divmod(int(errors.argmin()), 2 * margin + 1)
        best_at[scale] = float(errors.min()), ((y - margin) * FINE // COARSE, (x - margin) * FINE // COARSE)
    best = min(SCALES, key=lambda scale: best_at[scale][0])
    center = _middle(_pixels(a, FINE), round(FINE * REACH))
    tries = [(best + step, best_at[best][1]) for step in (-FINE_SCALE, 0.0, FINE_SCALE)]
    if best != 1.0:
        tries.append((1.0, best_at[1.0][1]))
    results = (_closest(center, _scaled(b, FINE, scale), place, scale) for scale, place in tries)
    return min(results, key=lambda alignment: alignment.distance)


def _middle(pixels: np.ndarray, margin: int) -> np.ndarray:
    return pixels[margin:-margin, margin:-margin]


def _closest(center: np.ndarray, other: np.ndarray, place: tuple[int, int], scale: float) -> Alignment:
    """Return the best alignment of `center` with windows of `other` up to two pixels from the shift `place` (y, x)."""
    margin = (len(other) - len(center)) // 2
    top, left = (int(np.clip(margin + p - 2, 0, 2 * margin - 4)) for p in place)
    part = other[top : top + len(center) + 4, left : left + len(center) + 4]
    windows = _windows(part, center.shape)
    target = np.moveaxis(center, 2, 0).ravel()
    gains = np.clip(windows @ target / np.maximum((windows**2).sum(1), 1e-6), 1 - GAIN, 1 + GAIN)
    distances = np.abs(windows * gains[:, None] - target).mean(1)
    at = int(distances.argmin())
    y, x = divmod(at, 5)
    shift = ((left + x - margin) / FINE, (top + y - margin) / FINE)
    return Alignment(float(distances[at]), shift, scale, float(gains[at]))


def structural_shift(a: Image, b: Image) -> Structure:
    """Return the distance between the outlines of `a` and `b`, independent of the light.

    It is the peak of their cross-correlation at 64 pixels over all shifts. Outlines are the log brightness without its
    low frequencies and with even local contrast, so that shading and shadows have little weight.
    """
    return _correlated(_outlines(_pixels(a, FINE)), b, 1.0)


def structural_fit(a: Image, b: Image) -> Structure:
    """Return `structural_shift` at the scale of `b`, of `SCALES`, at which the outlines match best.

    The scale is 1 unless another match is better by `MARGIN`: a new light changes the match slightly.
    """
    outlines = _outlines(_pixels(a, FINE))
    by_scale = {scale: _correlated(outlines, b, scale) for scale in SCALES}
    best = max(by_scale.values(), key=lambda structure: structure.match)
    return best if best.match > by_scale[1.0].match + MARGIN else by_scale[1.0]


def _correlated(outlines: np.ndarray, other: Image, scale: float) -> Structure:
    """Return the peak of the cross-correlation of `outlines` (H, W) with those of a panel magnified by `scale`."""
    two = _outlines(_scaled(other, FINE, scale))
    spectrum = np.fft.rfft2(outlines) * np.conj(np.fft.rfft2(two))
    surface = np.fft.irfft2(spectrum, outlines.shape) / max(np.sqrt((outlines**2).sum() * (two**2).sum()), 1e-9)
    y, x = np.unravel_index(int(surface.argmax()), surface.shape)
    dy, dx = ((int(p) + FINE // 2) % FINE - FINE // 2 for p in (y, x))
    return Structure(float(np.hypot(dx, dy)) / FINE, float(surface.max()), scale)


def whole_change(a: Image, b: Image) -> float:
    """Return how much two aligned panels differ everywhere; 0 if more than half of the image is unchanged.

    Each panel is reduced to 8×8 mean colors. The result is the median over the cells of the absolute log ratio of two
    cells, averaged over the channels. So 0.1 means that the typical cell is about 10 % brighter, darker or more
    colored. A subject that moved, or an object that appeared or vanished, changes fewer than half of the cells and has
    no effect.
    """
    one, two = (
        np.log(np.asarray(image.convert("RGB").resize((CELLS, CELLS), _BOX), dtype=np.float32) / 255 + 0.05)
        for image in (a, b)
    )
    return float(np.median(np.abs(one - two).mean(2)))


def _pixels(image: Image, side: int, bilinear: bool = False) -> np.ndarray:
    """Return a panel as float32 (side, side, 3) in 0..1, slightly smoothed against shifts of less than a pixel."""
    small = image.convert("RGB").resize((side, side), _BILINEAR if bilinear else _BOX)
    return _smooth(np.asarray(small, dtype=np.float32) / 255)


def _scaled(image: Image, size: int, scale: float) -> np.ndarray:
    """Return `_pixels` magnified about the middle by `scale`; beyond the border the last pixels are repeated."""
    side = round(size * scale)
    pixels = _pixels(image, side, bilinear=side > image.width)
    gap = side - size
    if gap >= 0:
        return pixels[gap // 2 : gap // 2 + size, gap // 2 : gap // 2 + size]
    before = -gap // 2
    return np.pad(pixels, ((before, -gap - before), (before, -gap - before), (0, 0)), mode="edge")


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """Smooth by [1 2 1] / 4 along height and width."""
    edges = ((1, 1), (1, 1), (0, 0))[: pixels.ndim]
    wide = np.pad(pixels, edges, mode="edge")
    tall = 0.5 * wide[:, 1:-1] + 0.25 * (wide[:, :-2] + wide[:, 2:])
    return 0.5 * tall[1:-1] + 0.25 * (tall[:-2] + tall[2:])


def _windows(other: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return every window (h, w) of pixels (H, W, 3), row by row, as rows of 3·h·w numbers."""
    views = np.lib.stride_tricks.sliding_window_view(other, shape[:2], axis=(0, 1))  # pyright: ignore
    return views.reshape(views.shape[0] * views.shape[1], -1)


def _squared_errors(center: np.ndarray, other: np.ndarray, margin: int) -> np.ndarray:
    """Return the mean squared difference of `center` and each window of `other`, row by row: ((2·margin + 1)²,)."""
    windows = _windows(other, center.shape)
    target = np.moveaxis(center, 2, 0).ravel()
    return ((windows**2).sum(1) - 2 * windows @ target + target @ target) / target.size


def _outlines(pixels: np.ndarray) -> np.ndarray:
    """Return brightness (H, W) as even local contrast with mean 0, faded towards the border."""
    value = np.log(pixels.mean(2) + 0.05)
    slow = value
    for _ in range(12):
        slow = _smooth(slow)
    detail = value - slow
    spread = detail**2
    for _ in range(24):
        spread = _smooth(spread)
    detail = detail / np.sqrt(spread + 1e-4)
    fade = np.hanning(len(detail) + 2)[1:-1] ** 0.5
    detail = (detail - detail.mean()) * fade[:, None] * fade[None, :]
    return detail - detail.mean()
