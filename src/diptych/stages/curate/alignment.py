"""Compares two panels pixel by pixel, after moving one onto the other: is the target a copy, do aligned panels align?

`copy_distance` is what keeps a pair from teaching the student to copy: the mean difference of two panels once a small
shift, a small change of scale and a little brightness are taken back. `structural_shift` is for tasks whose panels show
one scene (relight): how far the outlines of one lie from those of the other, whatever the light; `structural_fit` also
tells whether they are larger. `whole_change` is for the same tasks: how much the picture as a whole has changed, which
a new light does and a new hat does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FINE, COARSE = 64, 32  # pixels of a panel's side, for the last and the first look
REACH = 1 / 8  # of a panel: the largest shift that is taken back
SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)
FINE_SCALE = 0.025
CLEARLY = 0.04  # of a match, by which outlines must agree better at another scale
_BOX, _BILINEAR = 4, 2  # Pillow's resampling filters, whose import is left to whoever has an image
CELLS = 8  # of a panel's side, for the change of the whole picture
GAIN = 0.08  # the largest change of brightness that is taken back; a new light is more


@dataclass(frozen=True)
class Alignment:
    """`distance`: mean absolute difference of two panels, 0..1, at the best shift (x, y, in panels), scale and gain."""

    distance: float
    shift: tuple[float, float]
    scale: float
    gain: float

    def evidence(self) -> dict[str, Any]:
        """As plain values."""
        return {key: np.round(value, 4).tolist() for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Structure:
    """`shift`: distance of two panels' outlines, in panels. `match`: how well they agree there, 1 at best. `scale`: by
    which the second panel was magnified for it."""

    shift: float
    match: float
    scale: float = 1.0

    def evidence(self) -> dict[str, Any]:
        """As plain values."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def copy_distance(a: Image, b: Image) -> Alignment:
    """How different two panels are when one is laid over the other as well as it goes: 0 is a copy.

    The middle three quarters of `a` are looked for in `b` at every shift up to `REACH` and every scale, first at 32
    pixels, then at 64 around the best place, and around the best one at the same scale: a copy is mostly not zoomed.
    Both orders of a pair give nearly, not exactly, the same number.
    """
    a, b = (image.convert("RGB").resize((FINE, FINE), _BOX) for image in (a, b))
    margin = round(COARSE * REACH)
    centre = _middle(_pixels(a, COARSE), margin)
    found: dict[float, tuple[float, tuple[int, int]]] = {}
    for scale in SCALES:
        errors = _squared_errors(centre, _scaled(b, COARSE, scale), margin)
        y, x = divmod(int(errors.argmin()), 2 * margin + 1)
        found[scale] = float(errors.min()), ((y - margin) * FINE // COARSE, (x - margin) * FINE // COARSE)
    best = min(SCALES, key=lambda scale: found[scale][0])
    centre = _middle(_pixels(a, FINE), round(FINE * REACH))
    tries = [(best + step, found[best][1]) for step in (-FINE_SCALE, 0.0, FINE_SCALE)]
    if best != 1.0:
        tries.append((1.0, found[1.0][1]))
    return min((_closest(centre, _scaled(b, FINE, scale), place, scale) for scale, place in tries), key=_distance)


def _distance(alignment: Alignment) -> float:
    return alignment.distance


def _middle(pixels: np.ndarray, margin: int) -> np.ndarray:
    return pixels[margin:-margin, margin:-margin]


def _closest(centre: np.ndarray, other: np.ndarray, place: tuple[int, int], scale: float) -> Alignment:
    """The best alignment of `centre` with windows of `other` up to two pixels from shift `place` (y, x)."""
    margin = (len(other) - len(centre)) // 2
    top, left = (int(np.clip(margin + p - 2, 0, 2 * margin - 4)) for p in place)
    part = other[top : top + len(centre) + 4, left : left + len(centre) + 4]
    windows = _windows(part, centre.shape)
    target = np.moveaxis(centre, 2, 0).ravel()
    gains = np.clip(windows @ target / np.maximum((windows**2).sum(1), 1e-6), 1 - GAIN, 1 + GAIN)
    distances = np.abs(windows * gains[:, None] - target).mean(1)
    at = int(distances.argmin())
    y, x = divmod(at, 5)
    shift = ((left + x - margin) / FINE, (top + y - margin) / FINE)
    return Alignment(float(distances[at]), shift, scale, float(gains[at]))


def structural_shift(a: Image, b: Image) -> Structure:
    """How far the outlines of `b` lie from those of `a`, whatever the light: the peak of their cross-correlation.

    Log brightness, with its slow part taken away and its local contrast made even, so that shading and shadows weigh
    little; correlated at 64 pixels over all shifts.
    """
    return _correlated(_outlines(_pixels(a, FINE)), b, 1.0)


def structural_fit(a: Image, b: Image) -> Structure:
    """As `structural_shift`, at the one of `SCALES` for `b` at which outlines agree best: 1, unless another is clearly
    better (a changed light moves the match by a little)."""
    outlines = _outlines(_pixels(a, FINE))
    found = {scale: _correlated(outlines, b, scale) for scale in SCALES}
    best = max(found.values(), key=lambda structure: structure.match)
    return best if best.match > found[1.0].match + CLEARLY else found[1.0]


def _correlated(outlines: np.ndarray, other: Image, scale: float) -> Structure:
    """The peak of the cross-correlation of `outlines` (H, W) with those of a panel magnified by `scale`."""
    two = _outlines(_scaled(other, FINE, scale))
    spectrum = np.fft.rfft2(outlines) * np.conj(np.fft.rfft2(two))
    surface = np.fft.irfft2(spectrum, outlines.shape) / max(np.sqrt((outlines**2).sum() * (two**2).sum()), 1e-9)
    y, x = np.unravel_index(int(surface.argmax()), surface.shape)
    dy, dx = ((int(p) + FINE // 2) % FINE - FINE // 2 for p in (y, x))
    return Structure(float(np.hypot(dx, dy)) / FINE, float(surface.max()), scale)


def whole_change(a: Image, b: Image) -> float:
    """How much two aligned panels differ everywhere: 0 where more than half of the picture is as it was.

    Each panel as 8×8 mean colours; the log ratio of those at the same spot, its size averaged over the channels; and of
    the cells the median one. So 0.1 is a tenth brighter, darker or more coloured in the typical cell. A subject that
    drifted, or something that came or went, changes fewer than half of the cells and counts for nothing.
    """
    one, two = (
        np.log(np.asarray(image.convert("RGB").resize((CELLS, CELLS), _BOX), dtype=np.float32) / 255 + 0.05)
        for image in (a, b)
    )
    return float(np.median(np.abs(one - two).mean(2)))


def _pixels(image: Image, side: int, bilinear: bool = False) -> np.ndarray:
    """A panel as float32 (side, side, 3) in 0..1, a little smoothed so that part of a pixel does not count."""
    small = image.convert("RGB").resize((side, side), _BILINEAR if bilinear else _BOX)
    return _smooth(np.asarray(small, dtype=np.float32) / 255)


def _scaled(image: Image, size: int, scale: float) -> np.ndarray:
    """As `_pixels`, magnified about the middle by `scale`; past the border the last pixels go on."""
    side = round(size * scale)
    pixels = _pixels(image, side, bilinear=side > image.width)
    gap = side - size
    if gap >= 0:
        return pixels[gap // 2 : gap // 2 + size, gap // 2 : gap // 2 + size]
    before = -gap // 2
    return np.pad(pixels, ((before, -gap - before), (before, -gap - before), (0, 0)), mode="edge")


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """[1 2 1] / 4 along height and width."""
    edges = ((1, 1), (1, 1), (0, 0))[: pixels.ndim]
    wide = np.pad(pixels, edges, mode="edge")
    tall = 0.5 * wide[:, 1:-1] + 0.25 * (wide[:, :-2] + wide[:, 2:])
    return 0.5 * tall[1:-1] + 0.25 * (tall[:-2] + tall[2:])


def _windows(other: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every window (h, w) of pixels (H, W, 3), row by row, as rows of 3·h·w numbers."""
    views = np.lib.stride_tricks.sliding_window_view(other, shape[:2], axis=(0, 1))  # pyright: ignore
    return views.reshape(views.shape[0] * views.shape[1], -1)


def _squared_errors(centre: np.ndarray, other: np.ndarray, margin: int) -> np.ndarray:
    """Mean squared difference of `centre` and each window of `other`, row by row: ((2·margin + 1)²,)."""
    windows = _windows(other, centre.shape)
    target = np.moveaxis(centre, 2, 0).ravel()
    return ((windows**2).sum(1) - 2 * windows @ target + target @ target) / target.size


def _outlines(pixels: np.ndarray) -> np.ndarray:
    """Brightness (H, W) as evened local contrast with mean 0, faded towards the border."""
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
