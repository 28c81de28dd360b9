"""Pairs that show again what an earlier pair of the run shows: a teacher with few ideas draws one picture many times.

    find(candidates, 4, thresholds)      # {"c-000731-01": "c-000012-10", …}: the second shows the first again

A pair repeats an earlier one if its reference lies within so many bits of the other's reference, and its target of the
other's target, by a 64-bit perceptual hash. One pass in the order of the run, over hashes that curation left in the
evidence; no picture is read. A pair is compared with earlier pairs that stay, never with one that is refused itself, so
a slow drift of pictures is not swallowed whole, and every refused pair has its twin in `pairs/`. Panels of one grid,
and so the two orders of a pair, are never compared.
"""

from __future__ import annotations

import json
from array import array
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.data import records
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32  # pixels a panel is reduced to
LOW = 8  # frequencies along each side that the hash looks at
BUCKETS = 65_521  # most buckets of a band: a prime, so that any band spreads over them
_BOX = 4  # Pillow's resampling filter, whose import is left to whoever has an image
_COSINES = np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1))
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
_COLUMNS = ("id", "grid_id", "kept", "reason", "similarity", "copy_distance", "seam", "evidence")


def panel_hash(panel: Image) -> str:
    """A panel's perceptual hash, 64 bits as 16 hexadecimal digits: pHash.

    The lowest 8×8 frequencies (DCT-II) of the picture in grey at 32×32 pixels; a bit says whether one lies above their
    median. Size, compression, a little blur or brightness move few bits; half of them differ between two pictures.
    """
    grey = np.asarray(panel.convert("L").resize((SIDE, SIDE), _BOX), dtype=np.float64)
    # Rounded, so that an even panel, whose frequencies are all nought, has not the hash of rounding errors.
    waves = np.round(_COSINES @ grey @ _COSINES.T, 3).ravel()
    bits = waves > np.median(waves[1:])  # without the mean, which is far above
    return np.packbits(bits).tobytes().hex()


def find(
    candidates: Dataset, bits: int, thresholds: records.Thresholds, screens: records.Limits | None = None
) -> dict[str, str]:
    """`{id: id of the earlier pair that it repeats}`, of the candidates that thresholds and screens keep.

    Holds some 200 bytes for each pair that stays, and as much for each that does not. UserError if a candidate has no
    hashes.
    """
    table = Table(bits)
    found: dict[str, str] = {}
    grid, of_grid = None, []  # the rows of a grid stand together
    for _, _, batch in batches(candidates, *_COLUMNS):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            if not records.judged_again(row, thresholds, screens)[0]:
                continue
            if row["grid_id"] != grid:
                for name, reference, target in of_grid:
                    table.add(name, reference, target)
                grid, of_grid = row["grid_id"], []
            reference, target = _hashes(row)
            earlier = table.first(reference, target)
            if earlier is None:
                of_grid.append((row["id"], reference, target))
            else:
                found[row["id"]] = earlier
    return found


def _hashes(row: dict[str, Any]) -> tuple[int, int]:
    hashes = json.loads(row["evidence"]).get("hashes")
    if hashes is None:
        raise UserError(f"{row['id']} has no hashes in its evidence; curate with curate.duplicates, in another --out")
    return int(hashes["reference"], 16), int(hashes["target"], 16)


class Table:
    """Earlier pairs, found by parts of their reference's hash.

    64 bits in `bits + 1` bands: two hashes that differ in at most `bits` places agree in at least one band. So only the
    pairs in a band's bucket are compared, and none that is near is missed.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        edges = [64 * band // (bits + 1) for band in range(bits + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._buckets: list[dict[int, array[int]]] = [{} for _ in self._bands]
        self._names: list[str] = []
        self._codes = np.empty((2, 1024), dtype=np.uint64)  # reference and target of each

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, reference: int, target: int) -> None:
        """Puts a pair in, after all others."""
        number = len(self._names)
        if number == self._codes.shape[1]:
            self._codes = np.concatenate([self._codes, np.empty_like(self._codes)], axis=1)
        self._names.append(name)
        self._codes[:, number] = np.array([reference, target], dtype=np.uint64)
        for buckets, key in zip(self._buckets, self._keys(reference), strict=True):
            if key not in buckets:
                buckets[key] = array("I")
            buckets[key].append(number)

    def first(self, reference: int, target: int) -> str | None:
        """The name of the pair put in first whose panels both lie within `bits`; None if there is none."""
        parts = [bucket for b, key in zip(self._buckets, self._keys(reference), strict=True) if (bucket := b.get(key))]
        if not parts:
            return None
        numbers = np.concatenate([np.frombuffer(part, dtype=np.uint32) for part in parts])
        for codes, code in zip(self._codes, (reference, target), strict=True):
            differing = _ONES[(codes[numbers] ^ np.uint64(code)).view(np.uint8)].reshape(-1, 8).sum(1)
            numbers = numbers[differing <= self.bits]
        return self._names[int(numbers.min())] if len(numbers) else None

    def _keys(self, code: int) -> list[int]:
        return [(code >> low & mask) % BUCKETS for low, mask in self._bands]
