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

if TYPE_CHECKING:
    from PIL.Image import Image

WORK = 64  # pixels of a panel's side while searching
BANDS = 16  # bands of a panel's height that vote
NEAR = 5  # columns on either side that a seam is compared with
REACH = 1 / 16  # of a panel: how far from its even place a seam is looked for
OFF_CENTRE = 0.25  # an uneven cut must be this much stronger than the even one: renders have strong edges of their own
SLACK = 0.8  # puts 0 halfway between grids and single pictures of the pocket world (docs/data.md)
FLOOR = 1 / 255  # jumps below the last bit of 8 are none
WIDEST = 1 / 10  # of a panel: the widest border, gutter or pole
STEADY = 24  # levels of 255: how much the colour of a stripe may vary along it, its bands averaged
FLAT = 5  # levels: standard deviation of a gutter's pixels, which no painted thing has from edge to edge
EDGE = 20  # levels: what parts a stripe from its neighbour …
ENDS = (3, 4, 5)  # bands at the top or bottom where a seam may break off:
BROKEN = -0.25  # the first few vote no more than this on average,
BROKEN_GONE, GONE = -0.15, 1 / 8  # or no more than this, and their jumps are an eighth of the others'
RIVAL = 4  # bands in a row in which another edge is stronger
CLEAR, SURE = 14, 0.4  # bands in which a seam beside such an edge must stand out, and its strength then
EDGES, BORDER_EDGES = 0.75, 0.5  # … in this share of the bands: a gutter meets others, and skies of its colour

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
    left, right = _inside(pixels, image.width / cols)
    top, bottom = _inside(pixels.transpose(1, 0, 2), image.height / rows)
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
    found = [_seam(pixels, width * k // parts, width / parts, axis) for k in range(1, parts)]
    return [replace(seam, at=seam.at + first) for seam in found]


def _seam(pixels: np.ndarray, even: int, panel: float, axis: str) -> Seam:
    """As `find_seam`, past the stripes beside it; at one of them, a gutter, if that is where the seam is."""
    around = round(panel * (REACH + WIDEST + NEAR / WORK))
    low, high = max(0, even - around), min(pixels.shape[1], even + around)
    stripes = [(low + a, low + b) for a, b in _stripes(_rows_in_bands(pixels[:, low:high]), panel)]
    if not stripes:
        return find_seam(pixels, even, panel, axis)
    kept = np.ones(pixels.shape[1], bool)
    for start, end in stripes:
        kept[start:end] = False
    joined, places = pixels[:, kept], np.flatnonzero(kept)
    seam = find_seam(joined, int(np.searchsorted(places, even)), panel, axis)
    best = replace(seam, at=int(places[seam.at]), offset=int(places[seam.at]) - even)
    step = max(1, round(panel / WORK))
    for start, end in stripes:
        join, middle = int(kept[:start].sum()), start + (end - start) // 2
        small, first = _reduce(joined, join, step)
        strength = _joined(small, (join - first) // step, round((end - start) / step), _colour(pixels[:, start:end]))
        if abs(seam.at - join) <= step:
            best = replace(best, strength=min(best.strength, strength))  # the join itself
        if abs(middle - even) <= panel * REACH and strength >= best.strength:
            best = Seam(axis, middle, middle - even, strength, end - start)
    return best


def _colour(stripe: np.ndarray) -> np.ndarray | None:
    """The one colour (3,) in 0..1 of a gutter (H, W, 3), its smeared sides aside; None for what is shaded, a pole."""
    aside = stripe.shape[1] // 3
    middle = stripe[:, aside : stripe.shape[1] - aside].reshape(-1, 3)
    return middle.mean(0) / 255 if middle.std(0).max() <= FLAT else None


# ---- borders and stripes


def _inside(pixels: np.ndarray, panel: float) -> tuple[int, int]:
    """The first and last column (exclusive) of pixels (H, W, 3) inside a border, which has one colour on both sides."""
    width = pixels.shape[1]
    reach = min(width // 2, round(panel * 2 * WIDEST))
    first, last = (_border(strip, panel) for strip in (pixels[:, :reach], pixels[:, : width - reach - 1 : -1]))
    if first and last and np.abs(pixels[:, 0].mean(0) - pixels[:, -1].mean(0)).max() <= STEADY:
        return first, width - last
    return 0, width


def _border(pixels: np.ndarray, panel: float) -> int:
    """How many of the columns of pixels (H, W, 3), from the first on, are a border."""
    return next((end for start, end in _stripes(_rows_in_bands(pixels), panel, outermost=True) if start == 0), 0)


def _rows_in_bands(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) averaged over bands of rows: float32 (BANDS, W, 3), 0..255. Empty if there are too few rows."""
    if len(pixels) < BANDS:
        return np.zeros((BANDS, 0, 3), np.float32)
    edges = np.linspace(0, len(pixels), BANDS + 1).round().astype(int)
    return np.add.reduceat(pixels, edges[:-1], axis=0, dtype=np.float32) / np.diff(edges)[:, None, None]


def _stripes(bands: np.ndarray, panel: float, outermost: bool = False) -> list[tuple[int, int]]:
    """Columns [start, end) of bands (BANDS, W, 3) that stand apart as stripes of one colour from top to bottom.

    What a decoder smears of a stripe over its neighbours is part of it. With `outermost`, only one that begins at the
    first column, and needs no edge there.
    """
    steady = np.ptp(bands, axis=0).max(1) <= STEADY
    changes = np.flatnonzero(np.diff(np.r_[False, steady, False]))
    soft = max(1, round(panel / 128))
    found = []
    for start, end in changes.reshape(-1, 2):
        least = BORDER_EDGES if outermost else EDGES
        left = 0 if outermost and start == 0 else _edge(bands, start, -1, soft, least)
        right = _edge(bands, end - 1, 1, soft, least)
        if left is None or right is None or (outermost and start > 0):
            continue
        if end - start + left + right <= panel * WIDEST:
            found.append((int(start - left), int(end + right)))
    return found


def _edge(bands: np.ndarray, last: int, way: int, soft: int, least: float) -> int | None:
    """How many columns beyond a stripe's `last` are smeared by it; None unless it stands apart from what lies beyond in
    the share `least` of the bands."""
    beyond = last + way * (soft + 1)
    if not 0 <= beyond < bands.shape[1]:
        return None
    contrast = np.abs(bands[:, beyond] - bands[:, last]).max(1)  # (BANDS,)
    if np.mean(contrast >= EDGE) < least:
        return None
    for smeared in range(soft):
        part = np.abs(bands[:, last + way * (smeared + 1)] - bands[:, beyond]).mean()
        if part < 0.3 * np.abs(bands[:, last] - bands[:, beyond]).mean():
            return smeared
    return soft


# ---- seams


def find_seam(pixels: np.ndarray, even: int, panel: float, axis: str = "x") -> Seam:
    """The vertical seam of pixels (H, W, 3), uint8, near column `even`; `panel` is a panel's width in pixels."""
    if len(pixels) < BANDS:
        return Seam(axis, even, 0, -1.0)  # too small to look at: no grid
    step = max(1, round(panel / WORK))
    small, first = _reduce(pixels, even, step)
    centre = (even - first) // step
    reach = max(1, round(panel * REACH / step))
    votes = {at: v for at in range(centre - reach, centre + reach + 1) if (v := _votes(small, at)) is not None}
    if centre not in votes:
        return Seam(axis, even, 0, -1.0)
    if _strength(votes[centre]) < 0:
        votes[centre] = _past_rivals(small, centre, votes[centre])
    scores = {at: _strength(vote) for at, vote in votes.items()}
    best = max(scores, key=lambda at: (scores[at], -abs(at - centre)))
    if best == centre or scores[best] - OFF_CENTRE <= scores[centre]:
        return Seam(axis, even, 0, float(scores[centre]))
    at, strength = _sharpest(pixels, first + best * step, step), scores[best]
    if step > 1:
        small, first = _reduce(pixels, at, step)  # columns that begin at the seam itself show it best
        exact = _votes(small, (at - first) // step)
        strength = strength if exact is None else max(strength, _strength(exact))
    return Seam(axis, at, at - even, strength - OFF_CENTRE)


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


def _strength(seen: np.ndarray) -> float:
    """Of a column as seen (2, BANDS), votes and jumps: the votes' mean; but a seam that breaks off above or below, like
    a door's edge, is as weak as it is there."""
    votes, jumps = seen
    if votes.mean() >= 0:
        for vote, jump in ((votes, jumps), (votes[::-1], jumps[::-1])):
            for end in ENDS:
                found = vote[:end].mean()
                gone = jump[:end].mean() <= GONE * jump[end:].mean()
                if (end == ENDS[0] and found <= BROKEN) or (gone and found <= BROKEN_GONE):
                    return float(found)
    return float(votes.mean())


def _jumps(bands: np.ndarray, at: int) -> np.ndarray | None:
    """Those (BANDS, 2·NEAR + 1) around column `at`, its own in the middle; None if too few columns are beside it."""
    if at <= NEAR or at + NEAR >= bands.shape[1]:
        return None
    window = bands[:, at - NEAR - 1 : at + NEAR + 1]
    return np.sqrt(((window[:, 1:] - window[:, :-1]) ** 2).sum(2))


def _compared(jump: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How each band votes on a jump (BANDS,), beside the others (BANDS, N); and the jump: (2, BANDS)."""
    near = others.max(1) * SLACK
    return np.stack([(jump - near - FLOOR) / (jump + near + FLOOR), jump])


def _votes(bands: np.ndarray, at: int) -> np.ndarray | None:
    """How much, band by band, the jump before column `at` stands out; None if too few columns are beside it."""
    jumps = _jumps(bands, at)
    # The next column on either side is left out: a decoder smears a seam over two or three.
    return None if jumps is None else _compared(jumps[:, NEAR], np.delete(jumps, (NEAR - 1, NEAR, NEAR + 1), axis=1))


def _past_rivals(bands: np.ndarray, at: int, votes: np.ndarray) -> np.ndarray:
    """The votes without the columns that outdo `at` in a row of bands, doors and poles beside a seam; taken only if the
    seam then stands out from top to bottom, which the edge of a door does not."""
    jumps = _jumps(bands, at)
    assert jumps is not None
    stronger = jumps > SLACK * jumps[:, NEAR : NEAR + 1]
    above = np.lib.stride_tricks.sliding_window_view(stronger, RIVAL, axis=0).all(-1).any(0)
    rivals = np.convolve(above, np.ones(3, bool), "same").astype(bool)
    rivals[NEAR - 1 : NEAR + 2] = True
    if (~rivals).sum() < 2:
        return votes
    found = _compared(jumps[:, NEAR], jumps[:, ~rivals])
    return found if (found[0] > 0).sum() >= CLEAR and found[0].mean() >= SURE else votes


def _joined(bands: np.ndarray, at: int, lag: int, colour: np.ndarray | None) -> float:
    """Strength of the seam before column `at` of bands, where a stripe `lag` columns wide was taken out.

    One of a single `colour` must stand apart from both sides, and is a gutter. Behind any other a picture may go on:
    the jump over it is compared with jumps near it over as many columns.
    """
    lag = 1 if colour is not None else lag + 1
    sides = bands[:, max(0, at - NEAR - lag) : at], bands[:, at : at + NEAR + lag]
    if any(side.shape[1] < NEAR + lag for side in sides):
        return -1.0
    others = np.concatenate([side[:, lag:] - side[:, :-lag] for side in sides], axis=1)
    left, right = bands[:, at - 1], bands[:, at]
    jumps = [left - right] if colour is None else [left - colour, right - colour]
    jump = np.min([np.sqrt((jump**2).sum(1)) for jump in jumps], axis=0)
    return _strength(_compared(jump, np.sqrt((others**2).sum(2))))


def _sharpest(pixels: np.ndarray, near: int, step: int) -> int:
    """The column within `step` of `near` that the largest jump comes before."""
    low, high = max(1, near - step), min(pixels.shape[1] - 1, near + step)
    strip = pixels[:, low - 1 : high + 1].astype(np.float32)
    return low + int(np.abs(strip[:, 1:] - strip[:, :-1]).mean((0, 2)).argmax())
