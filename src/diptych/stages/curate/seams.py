"""Finds the seams between a grid's panels and cuts along them; says how sure it is that there is a seam at all.

First a flat border around the canvas is left out. A gutter is a stripe of one colour from edge to edge; so is a pole,
so stripes are taken out and what was on either side of them is joined: two panels then show a seam, one picture goes
on. Where there is neither, and the grid is even, panels are the canvas's very pixels.

A seam is a jump in colour that runs over the whole height. Outlines of things jump too, but over part of the height
only, and textures jump everywhere. So the image is averaged over sixteen bands of rows, and in each band the jump at
the cut is compared with the strongest one a few columns beside it:

    strength = mean over bands of (jump − 0.8 · strongest near) / (jump + 0.8 · strongest near)

1 is a clean seam, 0 a column about as strong as the strongest of its neighbours, and pictures without a seam lie well
below 0. Dark and pale grids count as much as colourful ones. The search runs at about 64 pixels a panel, whatever its
size.
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
    """How seams are looked for. Lengths are pixels of the reduced image, at `work` pixels a panel, where not said."""

    work: int = 64
    """Pixels of a panel's side while searching."""
    near: int = 5
    """Columns on either side that a seam is compared with."""
    reach: float = 1 / 16
    """How far from its even place a seam is looked for, in panels."""
    span: int = 20
    """Columns on either side of a seam's even place that are looked at."""
    off_centre: float = 0.25
    """An uneven cut must be this much stronger than the even one: renders have strong edges of their own."""
    slack: float = 0.8
    """Share of the strongest jump near. It puts 0 halfway between grids and single pictures of the pocket world
    (docs/data.md)."""
    floor: float = 1 / 255
    """Jumps below the last bit of 8 are none."""
    flat: float = 5
    """Levels of 255: the largest standard deviation of a gutter's pixels."""
    clean: float = 1
    """Levels: the standard deviation of pixels that no painted thing has, only a gutter."""
    level: float = 3
    """Levels: the spread of a stripe's column means that no painted thing has."""
    ends: int = 5
    """The most bands at the top and bottom in which a thing's edge breaks off, as no seam does."""
    gone: float = 1 / 6
    """There the edge has broken off where its jumps are at most this share of the others, …"""
    faint: float = 2
    """… at most so many times what is usual, …"""
    gone_vote: float = 0.1
    """… and vote no more than this."""
    unseen: float = 1.75
    """Or, at one end, where they are at most so many times what is usual, …"""
    unseen_vote: float = -0.1
    """… and vote no more than this."""
    broken: float = -0.25
    """The strength of an edge that breaks off."""
    rival: int = 4
    """Bands in a row in which another edge is stronger."""
    around: int = 8
    """Columns on either side in which such an edge is looked for."""
    clear: int = 12
    """Bands in which a seam beside such an edge must stand out."""
    sure: float = 0.2
    """The least strength of a seam beside such an edge."""
    beyond: int = 4
    """Columns past a rival that are looked at."""
    past: float = 0.5
    """The share of the seam's jump that is still there past a rival."""


SEARCH = SeamSearch()
_ABOVE, _BELOW = np.indices((SEARCH.ends + 1, SEARCH.ends + 1))  # bands that are taken together
_COUNTS = np.maximum(1, _ABOVE + _BELOW)
_ONE_END = _ABOVE * _BELOW == 0
_ENOUGH = (np.where(_ONE_END, 3, 2) <= _COUNTS) & (SEARCH.ends >= _COUNTS)

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Seam:
    """One cut. `axis` "x" is a vertical line before column `at`; `offset` is its distance from the even place.

    Panels end `gutter // 2` pixels before `at`, and the next begin `gutter` pixels later.
    """

    axis: str
    at: int
    offset: int
    strength: float
    gutter: int = 0

    @property
    def start(self) -> int:
        """Where the panels before it end."""
        return self.at - self.gutter // 2

    def evidence(self) -> dict[str, Any]:
        """As plain values; of the gutter only if there is one."""
        values = asdict(self) | {"strength": round(self.strength, 4)}
        return values if self.gutter else {key: value for key, value in values.items() if key != "gutter"}


@dataclass(frozen=True)
class Cut:
    """Panels in reading order, all of one size, the seams they were cut at, and their boxes on the canvas."""

    panels: list[Image]
    seams: list[Seam]
    boxes: list[Box]

    @property
    def strength(self) -> float:
        """Of the weakest seam; infinite for a grid of one panel."""
        return min((seam.strength for seam in self.seams), default=float("inf"))

    def evidence(self) -> list[dict[str, Any]]:
        """The seams as plain values."""
        return [seam.evidence() for seam in self.seams]


def cut(image: Image, rows: int, cols: int, panel_size: int) -> Cut:
    """Cuts a grid of rows×cols panels at its seams. Always cuts; `Cut.strength` says whether there was anything to cut.

    Panels of an evenly divided grid are its very pixels; those of an uneven cut, and those with a border or gutter
    left out, are resized to `panel_size`.
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
    """Where the panels along one axis begin and end."""
    starts = [first, *(seam.start + seam.gutter for seam in seams)]
    return list(zip(starts, [*(seam.start for seam in seams), last], strict=True))


def _seams(pixels: np.ndarray, parts: int, axis: str, first: int) -> list[Seam]:
    """The vertical seams that part pixels (H, W, 3) into `parts`; `first` is where they begin on the canvas."""
    width = pixels.shape[1]
    evens = [width * k // parts for k in range(1, parts)]
    found = [_seam(pixels, even, width / parts, axis) for even in evens]
    gutters = [seam.gutter for seam in found if seam.gutter]
    if gutters and len(gutters) < len(found):  # a grid has gutters everywhere or nowhere, and of one width
        for number, even in enumerate(evens):
            again = found[number] if found[number].gutter else _seam(pixels, even, width / parts, axis, KNOWN_EDGES)
            if min(gutters) - 2 <= again.gutter <= max(gutters) + 2:
                found[number] = again
    return [replace(seam, at=seam.at + first) for seam in found]


def _seam(pixels: np.ndarray, even: int, panel: float, axis: str, least: float = EDGES) -> Seam:
    """As `find_seam`, past the stripes beside it; at one of them, a gutter, if that is where the seam is. Stripes stand
    apart in the share `least` of the bands."""
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
        strength = _apart(small, (join - first) // step, round((end - start) / step), pixels[:, start:end], panel)
        if abs(seam.at - join) <= step:
            best = replace(best, strength=min(best.strength, strength))  # the join itself
        if abs(middle - even) <= panel * SEARCH.reach and strength >= best.strength:
            best = Seam(axis, middle, middle - even, strength, end - start)
    return best


def _apart(bands: np.ndarray, at: int, lag: int, stripe: np.ndarray, panel: float) -> float:
    """Strength of the seam before column `at` of bands, where the `stripe` (H, W, 3) of `lag` columns was taken out.

    A gutter parts its sides whatever they show; of a stripe that may be a pole, the picture must not go on behind it.
    """
    behind = _joined(bands, at, lag, None)
    if behind is None:
        return -1.0
    aside = stripe.shape[1] // 3
    middle = stripe[:, aside : stripe.shape[1] - aside].reshape(-1, 3)  # without its smeared sides
    spread = middle.std(0).max()
    smeared = max(1, round(panel / 128)) + 1
    columns = stripe[:, smeared : stripe.shape[1] - smeared].mean(0)  # (W, 3): a pole is round, a gutter is not
    level = len(columns) >= 3 and np.ptp(columns, axis=0).max() <= SEARCH.level
    parted = behind[0].mean() >= SEARCH.unseen_vote and behind[1].mean() > SEARCH.unseen * behind[2].mean()
    if spread > SEARCH.flat or not (spread <= SEARCH.clean or level or parted):
        return _strength(behind)
    beside = _joined(bands, at, lag, middle.mean(0) / 255)
    return -1.0 if beside is None else float(beside[0].mean())


# ---- seams


def find_seam(pixels: np.ndarray, even: int, panel: float, axis: str = "x") -> Seam:
    """The vertical seam of pixels (H, W, 3), uint8, near column `even`; `panel` is a panel's width in pixels."""
    if len(pixels) < BANDS:
        return Seam(axis, even, 0, -1.0)  # too small to look at: no grid
    step = max(1, round(panel / SEARCH.work))
    small, first = _reduce(pixels, even, step)
    centre = (even - first) // step
    reach = max(1, round(panel * SEARCH.reach / step))
    votes = {at: v for at in range(centre - reach, centre + reach + 1) if (v := _votes(small, at)) is not None}
    if centre not in votes:
        return Seam(axis, even, 0, -1.0)
    if _strength(votes[centre]) < 0:
        votes[centre] = _past_rivals(small, centre, votes[centre])
    scores = {at: _strength(vote) for at, vote in votes.items()}
    best = max(scores, key=lambda at: (scores[at], -abs(at - centre)))
    if best == centre or scores[best] - SEARCH.off_centre <= scores[centre]:
        return Seam(axis, even, 0, float(scores[centre]))
    at = _sharpest(pixels, first + best * step, step)
    small, first = _reduce(pixels, at, step)  # columns that begin at the seam itself show it best
    exact = _votes(small, (at - first) // step)
    strength = scores[best] if exact is None else _strength(exact)
    return Seam(axis, at, at - even, strength - SEARCH.off_centre)


def _reduce(pixels: np.ndarray, even: int, step: int) -> tuple[np.ndarray, int]:
    """Bands (BANDS, ≤ 2·span, 3) in 0..1, `step` pixels to a column, one of them beginning at `even`; and where the
    first begins."""
    first = max(even % step, even - SEARCH.span * step)
    count = min(2 * SEARCH.span, (pixels.shape[1] - first) // step)
    bands = rows_in_bands(pixels[:, first : first + count * step]) / 255
    return bands.reshape(BANDS, count, step, 3).mean(2), first


def _strength(seen: np.ndarray) -> float:
    """Of a column as seen (3, BANDS), votes, jumps and usual jumps: the votes' mean; but what breaks off above or
    below, like a door's edge, is no seam."""
    mean = float(seen[0].mean())
    return SEARCH.broken if mean >= 0 and _breaks_off(seen) else mean


def _breaks_off(seen: np.ndarray) -> bool:
    """Whether there is nothing of an edge left in the first few bands, the last few, or both."""
    sums = np.cumsum(np.pad(seen, ((0, 0), (1, 0))), axis=1)  # (3, BANDS + 1)
    first, last = sums[:, : SEARCH.ends + 1], sums[:, -1:] - sums[:, BANDS - SEARCH.ends :][:, ::-1]
    ends = first[:, :, None] + last[:, None, :]  # (3, above, below): sums over so many bands above and below
    vote, jump, usual = ends / _COUNTS
    inner = (sums[1, -1] - ends[1]) / (BANDS - _COUNTS)
    gone = (jump <= SEARCH.gone * inner) & (jump <= SEARCH.faint * usual) & (vote <= SEARCH.gone_vote)
    unseen = (jump <= SEARCH.unseen * usual) & (vote <= SEARCH.unseen_vote) & _ONE_END
    return bool(((gone | unseen) & _ENOUGH).any())


def _jumps(bands: np.ndarray, at: int, reach: int) -> np.ndarray | None:
    """Those (BANDS, 2·reach + 1) around column `at`, its own in the middle; None if too few columns are beside it."""
    if at <= reach or at + reach >= bands.shape[1]:
        return None
    window = bands[:, at - reach - 1 : at + reach + 1]
    return np.sqrt(((window[:, 1:] - window[:, :-1]) ** 2).sum(2))


def _compared(jump: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How each band votes on a jump (BANDS,), beside the others (BANDS, N); the jump; and what is usual among the
    others: (3, BANDS)."""
    near, floor = others.max(1) * SEARCH.slack, SEARCH.floor
    middle = (others.shape[1] - 1) // 2
    return np.stack([(jump - near - floor) / (jump + near + floor), jump, np.partition(others, middle, 1)[:, middle]])


def _votes(bands: np.ndarray, at: int) -> np.ndarray | None:
    """How much, band by band, the jump before column `at` stands out; None if too few columns are beside it."""
    jumps, own = _jumps(bands, at, SEARCH.near), SEARCH.near
    # The next column on either side is left out: a decoder smears a seam over two or three.
    return None if jumps is None else _compared(jumps[:, own], np.delete(jumps, (own - 1, own, own + 1), axis=1))


def _past_rivals(bands: np.ndarray, at: int, seen: np.ndarray) -> np.ndarray:
    """As seen without the edges that outdo `at` over a few bands, doors and poles beside a seam.

    Taken only if the seam then stands out nearly everywhere, and most of its jump is still there between what lies on
    its one side and what lies past the edges on the other: behind a pole in one picture, the picture goes on.
    """
    around = SEARCH.around
    jumps = _jumps(bands, at, around)
    if jumps is None:
        return seen
    own = jumps[:, around]
    stronger = np.asarray(jumps > SEARCH.slack * own[:, None])
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
    least = np.where(smeared, np.inf, jumps).min(1, keepdims=True)  # in the place of what is left out
    others = np.delete(np.where(smeared, least, jumps), (around - 1, around, around + 1), axis=1)
    found = _compared(own, others)
    clear = (found[0] > 0).sum() >= SEARCH.clear and found[0].mean() >= SEARCH.sure
    return found if clear and np.median(_past(bands, at, rivals) / (own + SEARCH.floor)) >= SEARCH.past else seen


def _past(bands: np.ndarray, at: int, rivals: np.ndarray) -> np.ndarray:
    """The least difference (BANDS,) between the column on one side of `at` and those past the rivals of a band, (BANDS,
    2·around + 1), on the other."""
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


def _joined(bands: np.ndarray, at: int, lag: int, colour: np.ndarray | None) -> np.ndarray | None:
    """The seam before column `at` of bands as seen (3, BANDS), where a stripe `lag` columns wide was taken out; None if
    too few columns are beside it.

    One of a single `colour` must stand apart from both sides, and is a gutter. Behind any other a picture may go on:
    the jump over it is compared with jumps near it over as many columns.
    """
    lag = 1 if colour is not None else lag + 1
    sides = bands[:, max(0, at - SEARCH.near - lag) : at], bands[:, at : at + SEARCH.near + lag]
    if any(side.shape[1] < SEARCH.near + lag for side in sides):
        return None
    others = np.concatenate([side[:, lag:] - side[:, :-lag] for side in sides], axis=1)
    left, right = bands[:, at - 1], bands[:, at]
    jumps = [left - right] if colour is None else [left - colour, right - colour]
    jump = np.min([np.sqrt((jump**2).sum(1)) for jump in jumps], axis=0)
    return _compared(jump, np.sqrt((others**2).sum(2)))


def _sharpest(pixels: np.ndarray, near: int, step: int) -> int:
    """The column within `step` of `near` that the largest jump comes before."""
    low, high = max(1, near - step), min(pixels.shape[1] - 1, near + step)
    strip = pixels[:, low - 1 : high + 1].astype(np.float32)
    return low + int(np.abs(strip[:, 1:] - strip[:, :-1]).mean((0, 2)).argmax())
