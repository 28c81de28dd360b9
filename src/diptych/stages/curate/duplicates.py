"""What shows the same again: the two panels of one pair (copies), or a pair and an earlier one (duplicates).

    find(candidates, Duplicates(hash=4, embedding=0.95), thresholds)
    # {"c-000731-01": Repeat("c-000012-10", "hash"), …}: the second shows the first again
    measure(look(reference), look(target), similarity=0.93)
    # {"hash": 22, "mirrored": 3, "embedding": 0.93}

Both are told by a 64-bit perceptual hash, which sees shapes in grey and no brightness, and by the cosine of the
embeddings of `curate.judge`, which see what is shown.

A copy is one picture in another brightness or tint, mirrored, or drawn again; `alignment.copy_distance` finds only
those that lie pixel on pixel. A student that learns from such a pair learns to give its reference back.

A pair repeats an earlier one if its reference lies near the other's reference, and its target near the other's target.
One pass in the order of the run, over what curation left in the evidence; no picture is read, no model asked. A pair is
compared with earlier pairs that stay, never with one that is refused itself, so a slow drift of pictures is not
swallowed whole, and every refused pair has its twin in `pairs/`. Panels of one grid, and so the two orders of a pair,
are never compared.
"""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.data import records
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.recipe.schema import Duplicates

SIDE = 32  # pixels a panel is reduced to
LOW = 8  # frequencies along each side that the hash looks at
BLOCK = 512  # pairs whose embeddings are compared at once
BUCKETS = 65_521  # most buckets of a band: a prime, so that any band spreads over them
_BOX = 4  # Pillow's resampling filter, whose import is left to whoever has an image
_COSINES = np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1))
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
_COLUMNS = ("id", "grid_id", "kept", "reason", "similarity", "copy_distance", "seam", "evidence")


def panel_hash(panel: Image) -> str:
    """A panel's perceptual hash, 64 bits as 16 hexadecimal digits: pHash.

    The lowest 8×8 frequencies (DCT-II) of the picture in grey at 32×32 pixels; a bit says whether one lies above their
    median. Size, compression, a little blur or brightness move few bits; half of them differ between two pictures.
    `imagehash.phash` reduces with another filter and its median counts the mean, so its bits are others.
    """
    grey = np.asarray(panel.convert("L").resize((SIDE, SIDE), _BOX), dtype=np.float64)
    # Rounded, so that an even panel, whose frequencies are all nought, has not the hash of rounding errors.
    waves = np.round(_COSINES @ grey @ _COSINES.T, 3).ravel()
    bits = waves > np.median(waves[1:])  # without the mean, which is far above
    return np.packbits(bits).tobytes().hex()


@dataclass(frozen=True)
class Repeat:
    """What a pair repeats: an earlier pair's id, and the test that says so, `hash` or `embedding`."""

    of: str
    test: str

    @property
    def reason(self) -> str:
        """For `failed/select/`."""
        return f"{records.DUPLICATE} of {self.of}: {self.test}"


@dataclass(frozen=True)
class _Pair:
    """What is compared of a candidate: hashes and embeddings of reference and target, empty where the test is off."""

    name: str
    grid: str
    hashes: Sequence[int]
    codes: Sequence[np.ndarray]


def find(
    candidates: Dataset, settings: Duplicates, thresholds: records.Thresholds, bounds: records.Bounds = records.NONE
) -> dict[str, Repeat]:
    """What each pair repeats, of the candidates that thresholds and bounds keep; those that repeat none are left out.

    Holds some 200 bytes for each pair that stays, with embeddings of D numbers 2·D more, and some 200 for each that
    does not. UserError if a candidate lacks what a test needs.
    """
    by_hash = Table(settings.hash) if settings.hash is not None else None
    by_embedding = Vectors(settings.embedding) if settings.embedding is not None else None
    found: dict[str, Repeat] = {}
    names: list[str] = []  # of the pairs in the table of embeddings
    grid, of_grid = "", []  # the rows of a grid stand together; they go into the tables when all have been compared
    for block in _blocks(_kept(candidates, settings, thresholds, bounds)):
        before = len(names)
        earlier = by_embedding.first(*_stacked(block)) if by_embedding is not None else np.empty(0)
        for i, pair in enumerate(block):
            if pair.grid != grid:
                for other in of_grid:
                    if by_hash is not None:
                        by_hash.add(other.name, *other.hashes)
                    if by_embedding is not None:
                        names.append(other.name)
                        by_embedding.add(*other.codes)
                grid, of_grid = pair.grid, []
            repeat = None
            if by_hash is not None and (name := by_hash.first(*pair.hashes)) is not None:
                repeat = Repeat(name, "hash")
            elif by_embedding is not None:
                # Those put in since this block began were not there when all of it was compared.
                number = earlier[i] if earlier[i] >= 0 else by_embedding.first(*_stacked([pair]), since=before)[0]
                repeat = Repeat(names[number], "embedding") if number >= 0 else None
            if repeat is None:
                of_grid.append(pair)
            else:
                found[pair.name] = repeat
    return found


def _kept(
    candidates: Dataset, settings: Duplicates, thresholds: records.Thresholds, bounds: records.Bounds
) -> Iterator[_Pair]:
    if settings.hash is None and settings.embedding is None:
        return
    for _, _, batch in batches(candidates, *_COLUMNS):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            if not records.judged_again(row, thresholds, bounds)[0]:
                continue
            evidence = json.loads(row["evidence"])
            hashes, codes = (), ()
            if settings.hash is not None:
                hashes = [int(code, 16) for code in _both(row["id"], evidence, "hashes")]
            if settings.embedding is not None:
                codes = [unpack(code) for code in _both(row["id"], evidence, "embeddings")]
            yield _Pair(row["id"], row["grid_id"], hashes, codes)


def _both(name: str, evidence: dict[str, Any], key: str) -> tuple[str, str]:
    """What the evidence keeps of both panels, reference and target."""
    found = evidence.get(key)
    if found is None:
        raise UserError(f"{name} has no {key} in its evidence; curate with curate.duplicates, in another --out")
    return found["reference"], found["target"]


def _blocks(pairs: Iterator[_Pair]) -> Iterator[list[_Pair]]:
    while block := list(islice(pairs, BLOCK)):
        yield block


def _stacked(pairs: Sequence[_Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the references and of the targets, each (N, D)."""
    references, targets = zip(*(pair.codes for pair in pairs), strict=True)
    return np.stack(references), np.stack(targets)


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


# Embeddings are kept as whole numbers from -127 to 127, a byte each: cosines are off by less than 0.002 (in the tests),
# and a product of two is a sum of whole numbers, exact in float32. So a verdict does not depend on the machine, its
# threads, or how many rows are compared at once.

LEVELS = 127
ROWS = 4096  # of the table that are compared at once


def pack(embedding: np.ndarray) -> str:
    """An embedding (D,) of any length as base64 of D signed bytes."""
    most = float(np.abs(embedding).max(initial=0.0))
    scaled = np.round(embedding * (LEVELS / most)) if 0 < most < np.inf else np.zeros(len(embedding))
    return base64.b64encode(scaled.astype(np.int8).tobytes()).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """What `pack` kept: int8 (D,)."""
    return np.frombuffer(base64.b64decode(text), dtype=np.int8)


def alike(a: np.ndarray, b: np.ndarray, least: float) -> np.ndarray:
    """Which rows of `a` (N, D) have a cosine of at least `least` with which of `b` (M, D), int8: bool (N, M)."""
    one, two = a.astype(np.float32), b.astype(np.float32)
    lengths = np.sqrt(np.outer((one**2).sum(1, dtype=np.float64), (two**2).sum(1, dtype=np.float64)))
    return (lengths > 0) & (one @ two.T >= least * lengths)


class Vectors:
    """Earlier pairs by the embeddings of their panels: 2·D bytes each."""

    def __init__(self, least: float) -> None:
        self.least = least
        self._pairs = np.empty((2, 0, 0), np.int8)  # references and targets
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, reference: np.ndarray, target: np.ndarray) -> None:
        """Puts a pair in, after all others; each int8 (D,)."""
        if self._count == self._pairs.shape[1]:
            more = np.empty((2, max(1024, self._count), len(reference)), np.int8)
            self._pairs = np.concatenate([self._pairs, more], axis=1) if self._count else more
        self._pairs[0, self._count], self._pairs[1, self._count] = reference, target
        self._count += 1

    def first(self, references: np.ndarray, targets: np.ndarray, since: int = 0) -> np.ndarray:
        """Of the pairs from number `since` on, that of the first whose panels are both alike, for each row of int8
        (B, D); -1 for none."""
        found = np.full(len(references), -1)
        for start in range(since, self._count, ROWS):
            left = np.flatnonzero(found < 0)
            known = self._pairs[:, start : min(start + ROWS, self._count)]
            both = alike(references[left], known[0], self.least)
            some = both.any(1)  # few: the second panels of the others need no look
            both[some] &= alike(targets[left[some]], known[1], self.least)
            hit = both.any(1)
            found[left[hit]] = start + both[hit].argmax(1)
        return found


DIGITS = 6  # of the cosine: rounded before anybody looks at it, so that a verdict from the stored one is the same


@dataclass(frozen=True)
class Look:
    """A panel's perceptual hash, and that of its mirror image."""

    hash: str
    mirrored: str


def look(panel: Image) -> Look:
    """Both hashes of a panel."""
    from PIL import Image as PIL

    return Look(panel_hash(panel), panel_hash(panel.transpose(PIL.Transpose.FLIP_LEFT_RIGHT)))


def measure(one: Look, other: Look, similarity: float) -> dict[str, float]:
    """How near two panels are to one picture: bits of 64 in which their hashes differ, as they are (`hash`) and with
    one of them `mirrored` (the fewer of both), and the cosine of their `embedding`s."""
    mirrored = min(_bits(one.hash, other.mirrored), _bits(one.mirrored, other.hash))
    return {"hash": _bits(one.hash, other.hash), "mirrored": mirrored, "embedding": round(similarity, DIGITS)}


def _bits(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()
