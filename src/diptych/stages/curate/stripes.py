"""Stripes of one colour that run from edge to edge of a canvas: borders, gutters between panels, and poles.

They are looked for in sixteen bands of rows: a stripe's colour is the same in all of them, and in most of them another
than what lies beside it. What a stripe means for a seam is decided in `seams`.
"""

from __future__ import annotations

import numpy as np

BANDS = 16  # bands of a panel's height
WIDEST = 1 / 10  # of a panel: the widest border, gutter or pole
STEADY = 24  # levels of 255: how much the colour of a stripe may vary along it, its bands averaged
EDGE = 20  # levels: what parts a stripe from its neighbour …
EDGES, BORDER_EDGES = 0.75, 0.5  # … in this share of the bands: a gutter meets others, and skies of its colour
KNOWN_EDGES = 0.35  # … and in this one where the other seams have gutters


def inside(pixels: np.ndarray, panel: float) -> tuple[int, int]:
    """The first and last column (exclusive) of pixels (H, W, 3) inside a border, which has one colour on both sides."""
    width = pixels.shape[1]
    reach = min(width // 2, round(panel * 2 * WIDEST))
    first, last = (_border(strip, panel) for strip in (pixels[:, :reach], pixels[:, : width - reach - 1 : -1]))
    if first and last and np.abs(pixels[:, 0].mean(0) - pixels[:, -1].mean(0)).max() <= STEADY:
        return first, width - last
    return 0, width


def _border(pixels: np.ndarray, panel: float) -> int:
    """How many of the columns of pixels (H, W, 3), from the first on, are a border."""
    found = find(rows_in_bands(pixels), panel, BORDER_EDGES, outermost=True)
    return next((end for start, end in found if start == 0), 0)


def rows_in_bands(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) averaged over bands of rows: float32 (BANDS, W, 3), 0..255. Empty if there are too few rows."""
    if len(pixels) < BANDS:
        return np.zeros((BANDS, 0, 3), np.float32)
    edges = np.linspace(0, len(pixels), BANDS + 1).round().astype(int)
    return np.add.reduceat(pixels, edges[:-1], axis=0, dtype=np.float32) / np.diff(edges)[:, None, None]


def find(bands: np.ndarray, panel: float, least: float, outermost: bool = False) -> list[tuple[int, int]]:
    """Columns [start, end) of bands (BANDS, W, 3) that are stripes of one colour from top to bottom, and stand apart in
    the share `least` of the bands.

    What a decoder smears of a stripe over its neighbours is part of it. With `outermost`, only one that begins at the
    first column, and needs no edge there.
    """
    steady = np.ptp(bands, axis=0).max(1) <= STEADY
    changes = np.flatnonzero(np.diff(np.r_[False, steady, False]))
    soft = max(1, round(panel / 128))
    found = []
    for start, end in changes.reshape(-1, 2):
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
