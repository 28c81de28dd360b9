"""Detects the seams between a grid's panels and cuts along them; measures the confidence that there is a seam.

First a flat border around the canvas is removed. A gutter is a stripe of one color from edge to edge, but so is a pole.
So stripes are removed and their two sides joined: between two panels there is then a seam, while one image continues.
Without border and gutters, the panels of an even grid are the unchanged pixels of the canvas.

A seam is a jump in color over the whole height. Outlines of objects jump too, but only over part of the height, and
textures jump everywhere. So the image is averaged over sixteen bands of rows, and in each band the jump at the cut is
compared with the strongest jump a few columns beside it:

    strength = mean over bands of (jump − 0.8 · strongest near) / (jump + 0.8 · strongest near)

1 is a clean seam, 0 a column about as strong as the strongest of its neighbors, and images without a seam are well
below 0. The measure does not depend on contrast, so dark and pale grids have the same strengths as colorful ones. The
search runs at about 64 pixels a panel, independent of the panel's size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.stages.curate.stripes import BANDS, EDGES, KNOWN_EDGES, WIDEST, inside, rows_in_bands
from diptych.stages.curate.stripes import find as find_stripes

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class SeamSearch:
    """The constants of the seam search. Lengths are in pixels of the reduced image, unless another unit is given."""

    work: int = 64  # pixels of a panel's side during the search
    near: int = 5  # columns on each side with which a seam is compared
    reach: float = 1 / 16  # maximum distance of a seam from its even position, in panels
    span: int = 20  # columns on each side of a seam's even position that are inspected
    # By how much an uneven cut must be stronger than the even one, because rendered images have strong edges.
    off_center: float = 0.25
    # Share of the strongest jump nearby. It puts 0 halfway between grids and single images of the pocket world
    # (docs/data.md).
    slack: float = 0.8
    floor: float = 1 / 255  # jumps smaller than the last bit of 8 count as none
    # A gutter, in levels of 255:
    flat: float = 5  # maximum standard deviation of its pixels
    clean: float = 1  # standard deviation up to which pixels cannot be a painted object
    level: float = 3  # range of the column means up to which a stripe cannot be a painted object
    # An object's edge breaks off at the top or bottom, which no seam does:
    ends: int = 5  # in at most this number of bands
    gone: float = 1 / 6  # its jumps there are at most this share of its other jumps,
    faint: float = 2  # at most this multiple of the usual jump,
    gone_vote: float = 0.1  # and the bands' vote is at most this;
    unseen: float = 1.75  # or, at one end, its jumps are at most this multiple of the usual jump,
    unseen_vote: float = -0.1  # and the bands' vote is at most this
    broken: float = -0.25  # strength of such an edge
    # A rival is another edge nearby, such as a door's, that is stronger than the seam over a few bands:
    rival: int = 4  # minimum number of bands in a row
    around: int = 8  # columns on each side that are searched
    clear: int = 12  # minimum number of bands in which a seam with a rival stands out
    sure: float = 0.2  # minimum strength of a seam with a rival
    beyond: int = 4  # columns past a rival that are inspected
    past: float = 0.5  # minimum share of the seam's jump that remains past a rival


SEARCH = SeamSearch()
_ABOVE, _BELOW = np.indices((SEARCH.ends + 1, SEARCH.ends + 1))  # bands that are combined
_COUNTS = np.maximum(1, _ABOVE + _BELOW)
_ONE_END = _ABOVE * _BELOW == 0
_ENOUGH = (np.where(_ONE_END, 3, 2) <= _COUNTS) & (SEARCH.ends >= _COUNTS)

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Seam:
    """One cut. `axis` "x" is a vertical line before column `at`; `offset` is its distance from the even position.

    Panels end `gutter // 2` pixels before `at`, and the next panels begin `gutter` pixels later.
    """

    axis: str
    at: int
    offset: int
    strength: float
    gutter: int = 0

    @property
    def start(self) -> int:
        """The position where the panels before the seam end."""
        return self.at - self.gutter // 2

    def evidence(self) -> dict[str, Any]:
        """Return plain values, with the gutter only if there is one."""
        values = asdict(self) | {"strength": round(self.strength, 4)}
        return values if self.gutter else {key: value for key, value in values.items() if key != "gutter"}


@dataclass(frozen=True)
class Cut:
    """Panels in reading order, all of one size, with their seams and their boxes on the canvas."""

    panels: list[Image]
    seams: list[Seam]
    boxes: list[Box]

    @property
    def strength(self) -> float:
        """The strength of the weakest seam; infinite for a grid of one panel."""
        return min((seam.strength for seam in self.seams), default=float("inf"))

    def evidence(self) -> list[dict[str, Any]]:
        """Return the seams as plain values."""
        return [seam.evidence() for seam in self.seams]


def cut(image: Image, rows: int, cols: int, panel_size: int) -> Cut:
    """Cut a grid of rows×cols panels at its seams. It always cuts; `Cut.strength` says whether there are seams.

    Panels of an evenly divided grid are its unchanged pixels. Panels of an uneven cut, or of a grid with a border or
    gutters, are resized to `panel_size`.
    """
    from PIL import Image as PIL

    pixels = np.asarray(image.convert("RGB"))
    left, right = inside(pixels, image.width / cols)
    top, bottom = inside(pixels.transpose(1, 0, 2), image.height / rows)
    inner = pixels[top:bottom, left:right]
    columns = _seams(inner, cols, "x", left)
    lines = _seams(inner.transpose(1, 0, 2), rows, "y", top)
    boxes = [(x, y, end, low) for y, low in _spans(lines, top, bottom) for x, end in _spans(columns, left, right)]
    panels = [image.crop(box) for box in boxes]
    size = (panel_size, panel_size)
    panels = [panel if panel.size == size else panel.resize(size, PIL.Resampling.LANCZOS) for panel in panels]
    return Cut(panels, columns + lines, boxes)


def _spans(seams: list[Seam], first: int, last: int) -> list[tuple[int, int]]:
    """Return where the panels along one axis begin and end."""
    starts = [first, *(seam.start + seam.gutter for seam in seams)]
    return list(zip(starts, [*(seam.start for seam in seams), last], strict=True))


def _seams(pixels: np.ndarray, parts: int, axis: str, first: int) -> list[Seam]:
    """Return the vertical seams of pixels (H, W, 3) with `parts` panels; the pixels begin at `first` on the canvas."""
    width = pixels.shape[1]
    evens = [width * k // parts for k in range(1, parts)]
    seams = [_seam(pixels, even, width / parts, axis) for even in evens]
    gutters = [seam.gutter for seam in seams if seam.gutter]
    if gutters and len(gutters) < len(seams):  # a grid has gutters everywhere or nowhere, and all of one width
        for number, even in enumerate(evens):
            again = seams[number] if seams[number].gutter else _seam(pixels, even, width / parts, axis, KNOWN_EDGES)
            if min(gutters) - 2 <= again.gutter <= max(gutters) + 2:
                seams[number] = again
    return [replace(seam, at=seam.at + first) for seam in seams]


def _seam(pixels: np.ndarray, even: int, panel: float, axis: str, least: float = EDGES) -> Seam:
    """Return `find_seam` without the stripes nearby, or one of these stripes if it is the gutter.

    Stripes contrast with their neighbors in at least the share `least` of the bands.
    """
    around = round(panel * (SEARCH.reach + WIDEST + SEARCH.near / SEARCH.work))
    low, high = max(0, even - around), min(pixels.shape[1], even + around)
    stripes = [(low + a, low + b) for a, b in find_stripes(rows_in_bands(pixels[:, low:high]), panel, least)]
    if not stripes:
        return find_seam(pixels, even, panel, axis)
    kept = np.ones(pixels.shape[1], bool)
    for start, end in stripes:
        kept[start:end] = False
    joined, places = pixels[:, kept], np.flatnonzero(kept)
    seam = find_seam(joined, int(np.searchsorted(places, even)), panel, axis)
    best = replace(seam, at=int(places[seam.at]), offset=int(places[seam.at]) - even)
    step = max(1, round(panel / SEARCH.work))
    for start, end in stripes:
        join, middle = int(kept[:start].sum()), start + (end - start) // 2
        small, first = _reduce(joined, join, step)
        strength = _stripe_strength(
            small, (join - first) // step, round((end - start) / step), pixels[:, start:end], panel
        )
        if abs(seam.at - join) <= step:
            best = replace(best, strength=min(best.strength, strength))  # the join
        if abs(middle - even) <= panel * SEARCH.reach and strength >= best.strength:
            best = Seam(axis, middle, middle - even, strength, end - start)
    return best


def _stripe_strength(bands: np.ndarray, at: int, lag: int, stripe: np.ndarray, panel: float) -> float:
    """Return the strength of the seam before column `at` of bands, where a `stripe` (H, W, 3) of `lag` columns was.

    A gutter is a seam with any images on its sides. For a stripe that may be a pole, the image must not continue behind
    it.
    """
    behind = _joined(bands, at, lag, None)
    if behind is None:
        return -1.0
    aside = stripe.shape[1] // 3
    middle = stripe[:, aside : stripe.shape[1] - aside].reshape(-1, 3)  # without its smeared sides
    spread = middle.std(0).max()
    smeared = max(1, round(panel / 128)) + 1
    columns = stripe[:, smeared : stripe.shape[1] - smeared].mean(0)  # (W, 3): a pole is shaded, a gutter is not
    level = len(columns) >= 3 and np.ptp(columns, axis=0).max() <= SEARCH.level
    parted = behind[0].mean() >= SEARCH.unseen_vote and behind[1].mean() > SEARCH.unseen * behind[2].mean()
    if spread > SEARCH.flat or not (spread <= SEARCH.clean or level or parted):
        return _strength(behind)
    beside = _joined(bands, at, lag, middle.mean(0) / 255)
    return -1.0 if beside is None else float(beside[0].mean())


def find_seam(pixels: np.ndarray, even: int, panel: float, axis: str = "x") -> Seam:
    """Return the vertical seam of pixels (H, W, 3), uint8, near column `even`; `panel` is a panel's width in pixels."""
    if len(pixels) < BANDS:
        return Seam(axis, even, 0, -1.0)  # too small for a grid
    step = max(1, round(panel / SEARCH.work))
    small, first = _reduce(pixels, even, step)
    center = (even - first) // step
    reach = max(1, round(panel * SEARCH.reach / step))
    votes = {at: v for at in range(center - reach, center + reach + 1) if (v := _votes(small, at)) is not None}
    if center not in votes:
        return Seam(axis, even, 0, -1.0)
    if _strength(votes[center]) < 0:
        votes[center] = _past_rivals(small, center, votes[center])
    scores = {at: _strength(vote) for at, vote in votes.items()}
    best = max(scores, key=lambda at: (scores[at], -abs(at - center)))
    if best == center or scores[best] - SEARCH.off_center <= scores[center]:
        return Seam(axis, even, 0, float(scores[center]))
    at = _sharpest(pixels, first + best * step, step)
    small, first = _reduce(pixels, at, step)  # columns that begin at the seam itself show it best
    exact = _votes(small, (at - first) // step)
    strength = scores[best] if exact is None else _strength(exact)
    return Seam(axis, at, at - even, strength - SEARCH.off_center)


def _reduce(pixels: np.ndarray, even: int, step: int) -> tuple[np.ndarray, int]:
    """Return bands (BANDS, ≤ 2·span, 3) in 0..1, with `step` pixels to a column, and the position of the first column.

    One column begins at `even`.
    """
    first = max(even % step, even - SEARCH.span * step)
    count = min(2 * SEARCH.span, (pixels.shape[1] - first) // step)
    bands = rows_in_bands(pixels[:, first : first + count * step]) / 255
    return bands.reshape(BANDS, count, step, 3).mean(2), first


def _strength(seen: np.ndarray) -> float:
    """Return the strength of a column from its votes, jumps and usual jumps (3, BANDS): the mean of the votes.

    An edge that breaks off above or below, like that of a door, is not a seam.
    """
    mean = float(seen[0].mean())
    return SEARCH.broken if mean >= 0 and _breaks_off(seen) else mean


def _breaks_off(seen: np.ndarray) -> bool:
    """Whether an edge is absent in the first few bands, the last few, or both."""
    sums = np.cumsum(np.pad(seen, ((0, 0), (1, 0))), axis=1)  # (3, BANDS + 1)
    first, last = sums[:, : SEARCH.ends + 1], sums[:, -1:] - sums[:, BANDS - SEARCH.ends :][:, ::-1]
    ends = first[:, :, None] + last[:, None, :]  # (3, above, below): sums over this number of bands above and below
    vote, jump, usual = ends / _COUNTS
    inner = (sums[1, -1] - ends[1]) / (BANDS - _COUNTS)
    gone = (jump <= SEARCH.gone * inner) & (jump <= SEARCH.faint * usual) & (vote <= SEARCH.gone_vote)
    unseen = (jump <= SEARCH.unseen * usual) & (vote <= SEARCH.unseen_vote) & _ONE_END
    return bool(((gone | unseen) & _ENOUGH).any())


def _jumps(bands: np.ndarray, at: int, reach: int) -> np.ndarray | None:
    """Return the jumps (BANDS, 2·reach + 1) around column `at`, or None with too few columns beside it."""
    if at <= reach or at + reach >= bands.shape[1]:
        return None
    window = bands[:, at - reach - 1 : at + reach + 1]
    return np.sqrt(((window[:, 1:] - window[:, :-1]) ** 2).sum(2))


def _compared(jump: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return (3, BANDS): each band's vote on a jump (BANDS,) compared with the others (BANDS, N); the jump; and the
    median of the others."""
    near, floor = others.max(1) * SEARCH.slack, SEARCH.floor
    middle = (others.shape[1] - 1) // 2
    return np.stack([(jump - near - floor) / (jump + near + floor), jump, np.partition(others, middle, 1)[:, middle]])


def _votes(bands: np.ndarray, at: int) -> np.ndarray | None:
    """Return how much the jump before column `at` stands out in each band, or None with too few columns beside it."""
    jumps, middle = _jumps(bands, at, SEARCH.near), SEARCH.near
    # The next column on each side is left out, because a decoder smears a seam over two or three columns.
    if jumps is None:
        return None
    return _compared(jumps[:, middle], np.delete(jumps, (middle - 1, middle, middle + 1), axis=1))


def _past_rivals(bands: np.ndarray, at: int, seen: np.ndarray) -> np.ndarray:
    """Return `seen` without rivals: edges, as of doors and poles beside a seam, that are stronger over a few bands.

    This applies only if the seam then stands out almost everywhere, and if most of its jump remains between the columns
    on its one side and those past the rivals on the other. Behind a pole in one image, the image continues.
    """
    around = SEARCH.around
    jumps = _jumps(bands, at, around)
    if jumps is None:
        return seen
    jump = jumps[:, around]
    stronger = np.asarray(jumps > SEARCH.slack * jump[:, None])
    stronger[:, around - 1 : around + 2] = False
    windows = np.lib.stride_tricks.sliding_window_view(stronger, SEARCH.rival, axis=0)
    runs: Any = windows.all(-1)  # (BANDS - rival + 1, columns)
    rivals = np.zeros_like(stronger)
    for shift in range(SEARCH.rival):
        rivals[shift : shift + len(runs)] |= runs
    smeared = rivals.copy()
    smeared[:, 1:] |= rivals[:, :-1]
    smeared[:, :-1] |= rivals[:, 1:]
    smeared[:, around - 1 : around + 2] = True
    if not rivals.any() or (~smeared).sum(1).min() < 2:
        return seen
    least = np.where(smeared, np.inf, jumps).min(1, keepdims=True)  # replaces the columns that are left out
    others = np.delete(np.where(smeared, least, jumps), (around - 1, around, around + 1), axis=1)
    without = _compared(jump, others)
    clear = (without[0] > 0).sum() >= SEARCH.clear and without[0].mean() >= SEARCH.sure
    return without if clear and np.median(_past(bands, at, rivals) / (jump + SEARCH.floor)) >= SEARCH.past else seen


def _past(bands: np.ndarray, at: int, rivals: np.ndarray) -> np.ndarray:
    """Return the least difference (BANDS,) between the column on one side of `at` and the columns past the rivals.

    `rivals` is (BANDS, 2·around + 1).
    """
    least = np.full(BANDS, np.inf)
    for way in (1, -1):
        here = bands[:, at - 1] if way > 0 else bands[:, at]
        for band in range(BANDS):
            of_side = rivals[band, SEARCH.around + 1 :] if way > 0 else rivals[band, SEARCH.around - 1 :: -1]
            if of_side.any():
                edge = at + way * (int(np.flatnonzero(of_side)[-1]) + 2)
                past = (
                    bands[band, edge : edge + SEARCH.beyond]
                    if way > 0
                    else bands[band, max(0, edge - SEARCH.beyond) : edge]
                )
                if len(past):
                    least[band] = min(least[band], np.sqrt(((past.mean(0) - here[band]) ** 2).sum()))
    return np.where(np.isfinite(least), least, np.sqrt(((bands[:, at] - bands[:, at - 1]) ** 2).sum(1)))


def _joined(bands: np.ndarray, at: int, lag: int, color: np.ndarray | None) -> np.ndarray | None:
    """Return votes, jumps and usual jumps (3, BANDS) of the seam before column `at`, where a stripe was removed.

    A stripe of a single `color` is a gutter and must contrast with both sides. Behind any other stripe, `lag` columns
    wide, an image may continue: the jump over it is compared with jumps nearby over as many columns. The result is None
    with too few columns beside the stripe.
    """
    lag = 1 if color is not None else lag + 1
    sides = bands[:, max(0, at - SEARCH.near - lag) : at], bands[:, at : at + SEARCH.near + lag]
    if any(side.shape[1] < SEARCH.near + lag for side in sides):
        return None
    others = np.concatenate([side[:, lag:] - side[:, :-lag] for side in sides], axis=1)
    left, right = bands[:, at - 1], bands[:, at]
    jumps = [left - right] if color is None else [left - color, right - color]
    jump = np.min([np.sqrt((jump**2).sum(1)) for jump in jumps], axis=0)
    return _compared(jump, np.sqrt((others**2).sum(2)))


def _sharpest(pixels: np.ndarray, near: int, step: int) -> int:
    """Return the column within `step` of `near` with the largest jump before it."""
    low, high = max(1, near - step), min(pixels.shape[1] - 1, near + step)
    strip = pixels[:, low - 1 : high + 1].astype(np.float32)
    return low + int(np.abs(strip[:, 1:] - strip[:, :-1]).mean((0, 2)).argmax())
