"""Stripes of one color that run from edge to edge of a canvas: borders, gutters between panels, and poles.

They are searched in sixteen bands of rows. A stripe has the same color in all bands, and in most bands its neighbors
have another color. `seams` decides what a stripe means for a seam.
"""

from __future__ import annotations

import numpy as np

BANDS = 16  # bands of a panel's height
WIDEST = 1 / 10  # maximum width of a border, gutter or pole, in panels
STEADY = 24  # levels of 255: maximum variation of a stripe's color along it, averaged in each band
EDGE = 20  # levels: minimum contrast of a stripe to its neighbors, in a share of the bands:
EDGES = 0.75  # the share for a gutter, which may cross other gutters and touch a sky of its color
BORDER_EDGES = 0.5  # the share for a border
KNOWN_EDGES = 0.35  # the share for a gutter if the other seams have gutters


def inside(pixels: np.ndarray, panel: float) -> tuple[int, int]:
    """Return the first and last column (exclusive) of pixels (H, W, 3) inside a border of one color on both sides."""
    width = pixels.shape[1]
    reach = min(width // 2, round(panel * 2 * WIDEST))
    first, last = (_border(strip, panel) for strip in (pixels[:, :reach], pixels[:, : width - reach - 1 : -1]))
    if first and last and np.abs(pixels[:, 0].mean(0) - pixels[:, -1].mean(0)).max() <= STEADY:
        return first, width - last
    return 0, width


def _border(pixels: np.ndarray, panel: float) -> int:
    """Return the number of columns of pixels (H, W, 3), from the first on, that are a border."""
    stripes = find(rows_in_bands(pixels), panel, BORDER_EDGES, outermost=True)
    return next((end for start, end in stripes if start == 0), 0)


def rows_in_bands(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (H, W, 3) averaged over bands of rows: float32 (BANDS, W, 3), 0..255; empty with too few rows."""
    if len(pixels) < BANDS:
        return np.zeros((BANDS, 0, 3), np.float32)
    edges = np.linspace(0, len(pixels), BANDS + 1).round().astype(int)
    return np.add.reduceat(pixels, edges[:-1], axis=0, dtype=np.float32) / np.diff(edges)[:, None, None]


def find(bands: np.ndarray, panel: float, least: float, outermost: bool = False) -> list[tuple[int, int]]:
    """Return columns [start, end) of bands (BANDS, W, 3) that are stripes of one color from top to bottom.

    A stripe contrasts with its neighbors in at least the share `least` of the bands. Columns over which a decoder
    smears the stripe are part of it. With `outermost`, only a stripe at the first column counts, without an edge there.
    """
    steady = np.ptp(bands, axis=0).max(1) <= STEADY
    changes = np.flatnonzero(np.diff(np.r_[False, steady, False]))
    soft = max(1, round(panel / 128))
    stripes = []
    for start, end in changes.reshape(-1, 2):
        left = 0 if outermost and start == 0 else _edge(bands, start, -1, soft, least)
        right = _edge(bands, end - 1, 1, soft, least)
        if left is None or right is None or (outermost and start > 0):
            continue
        if end - start + left + right <= panel * WIDEST:
            stripes.append((int(start - left), int(end + right)))
    return stripes


def _edge(bands: np.ndarray, last: int, way: int, soft: int, least: float) -> int | None:
    """Return the number of columns after a stripe's `last` that it smears into; None if the contrast is too small.

    The columns after these must contrast with the stripe in at least the share `least` of the bands.
    """
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
