"""Where many numbers lie, in little memory: counts on a fine lattice, and from them quantiles and histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

CELL = 1 / 4096  # width of a lattice cell: what a quantile may be off by
_FAR = 2**52  # cells from 0: numbers beyond are all in the last one


class Spread:
    """Numbers added batch by batch. None and NaN are counted apart, as missing.

    Judges' numbers lie between -1 and 1, so there are at most some 8,000 cells, for any number of rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self.missing = 0
        self.low = float("inf")
        self.high = float("-inf")
        self.total = 0.0
        self._cells: Counter[int] = Counter()

    def add(self, values: Sequence[float | None] | np.ndarray) -> None:
        """Counts values (N,)."""
        numbers = np.array(values, dtype=float)
        known = numbers[np.isfinite(numbers)]
        self.missing += len(numbers) - len(known)
        if not len(known):
            return
        self.count += len(known)
        self.total += float(known.sum())
        self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
        cells, counts = np.unique(np.clip(np.floor(known / CELL), -_FAR, _FAR).astype(np.int64), return_counts=True)
        self._cells.update(dict(zip(cells.tolist(), counts.tolist(), strict=True)))

    @property
    def mean(self) -> float | None:
        """None if nothing was added."""
        return self.total / self.count if self.count else None

    def quantiles(self, *shares: float) -> list[float]:
        """Values below which these shares (0 to 1) lie, each right to a cell. At least one number must be there."""
        assert self.count, "no numbers, no quantiles"
        cells = np.array(sorted(self._cells))
        ends = np.cumsum([self._cells[cell] for cell in cells.tolist()])
        found = []
        for share in shares:
            rank = share * (self.count - 1) + 0.5
            place = min(int(np.searchsorted(ends, rank)), len(cells) - 1)
            inside = 1 - (ends[place] - rank) / self._cells[int(cells[place])]
            found.append(float(np.clip((cells[place] + inside) * CELL, self.low, self.high)))
        return found

    def edges(self, bins: int) -> list[float]:
        """The bounds of `bins` equal bins over all numbers."""
        assert self.count, "no numbers, no bins"
        low, high = np.floor(self.low / CELL) * CELL, (np.floor(self.high / CELL) + 1) * CELL
        return np.linspace(low, high, bins + 1).tolist()

    def histogram(self, edges: Sequence[float]) -> list[int]:
        """How many numbers lie in each bin between `edges`; a cell counts where its middle is."""
        middles = np.array([(cell + 0.5) * CELL for cell in self._cells])
        return np.histogram(middles, bins=np.array(edges), weights=list(self._cells.values()))[0].astype(int).tolist()
