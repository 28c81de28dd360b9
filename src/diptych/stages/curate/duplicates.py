"""Repeated images: the two panels of one pair (copies), or a pair and an earlier pair (duplicates).

    find(candidates, Duplicates(hash=4, embedding=0.95), thresholds)
    # {"c-000731-01": Repeat("c-000012-10", "hash"), …}: the first pair repeats the second
    measure(hash_both(reference), hash_both(target), similarity=0.93)
    # {"hash": 22, "mirrored": 3, "embedding": 0.93}

Both are detected by a 64-bit perceptual hash, which responds to shapes and not to brightness or color, and by the
cosine similarity of the embeddings of `curate.judge`, which respond to the content.

A copy is the same image in another brightness or tint, mirrored, or generated again. `alignment.copy_distance` detects
only copies that match pixel by pixel. A student trained on such pairs learns to return its reference.

A pair repeats an earlier one if its reference is near the other's reference, and its target near the other's target.
The search is one pass in the order of the run over the stored evidence, without images or models. A pair is compared
only with earlier pairs that stay. So a slow drift of images does not remove all of them, and every rejected pair has
its counterpart in `pairs/`. Panels of one grid, and so the two orders of a pair, are never compared.
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

from diptych.data import verdicts
from diptych.data.scan import batches
from diptych.data.store import Dataset
from diptych.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.recipe.schema import Duplicates, Thresholds

SIDE = 32  # pixels to which a panel is reduced
LOW = 8  # frequencies along each side that the hash uses
BLOCK = 512  # pairs whose embeddings are compared at once
BUCKETS = 65_521  # maximum buckets of a band: a prime, so that every band is distributed over all of them
LEVELS = 127  # embeddings are stored as whole numbers from -127 to 127
ROWS = 4096  # rows of the table that are compared at once
DIGITS = 6  # digits of the stored cosine: it is rounded before it is tested, so that a repeated test gives the same
_BOX = 4  # Pillow's resampling filter; only callers with an image import Pillow
_COSINES = np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1))
_ONES = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
_COLUMNS = ("id", "grid_id", "kept", "reason", "similarity", "copy_distance", "seam", "evidence")


def panel_hash(panel: Image) -> str:
    """Return a panel's perceptual hash (pHash), 64 bits as 16 hexadecimal digits.

    It uses the lowest 8×8 frequencies (DCT-II) of the grayscale image at 32×32 pixels. A bit says whether a frequency
    is above their median. Size, compression, slight blur or brightness change few bits; two different images differ in
    half of them. The bits of `imagehash.phash` differ: it reduces with another filter, and its median includes the
    mean.
    """
    gray = np.asarray(panel.convert("L").resize((SIDE, SIDE), _BOX), dtype=np.float64)
    # Rounded, so that the hash of a uniform panel, whose frequencies are all 0, does not depend on rounding errors.
    waves = np.round(_COSINES @ gray @ _COSINES.T, 3).ravel()
    bits = waves > np.median(waves[1:])  # without the mean, which is far above
    return np.packbits(bits).tobytes().hex()


@dataclass(frozen=True)
class Repeat:
    """The earlier pair that a pair repeats, by id, and the test that detected it: `hash` or `embedding`."""

    of: str
    test: str

    @property
    def reason(self) -> str:
        """The reason in `failed/select/`."""
        return f"{verdicts.DUPLICATE} of {self.of}: {self.test}"


@dataclass(frozen=True)
class _Pair:
    """The hashes and embeddings of a candidate's reference and target; empty if the test is off."""

    name: str
    grid: str
    hashes: Sequence[int]
    codes: Sequence[np.ndarray]


def find(
    candidates: Dataset, settings: Duplicates, thresholds: Thresholds, bounds: verdicts.Bounds = verdicts.NONE
) -> dict[str, Repeat]:
    """Return the repeats among the candidates that thresholds and bounds accept, by the pair's id.

    It needs about 200 bytes of memory a pair, and 2·D more for each pair that stays with embeddings of D numbers.
    Raises UserError if a candidate lacks the evidence that a test needs.
    """
    by_hash = HashTable(settings.hash) if settings.hash is not None else None
    by_embedding = Vectors(settings.embedding) if settings.embedding is not None else None
    repeats: dict[str, Repeat] = {}
    names: list[str] = []  # of the pairs in the table of embeddings
    grid, of_grid = "", []  # the rows of a grid are adjacent; they are added to the tables after all are compared
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
                # The block was compared before the pairs since its beginning were added.
                number = earlier[i] if earlier[i] >= 0 else by_embedding.first(*_stacked([pair]), since=before)[0]
                repeat = Repeat(names[number], "embedding") if number >= 0 else None
            if repeat is None:
                of_grid.append(pair)
            else:
                repeats[pair.name] = repeat
    return repeats


def _kept(
    candidates: Dataset, settings: Duplicates, thresholds: Thresholds, bounds: verdicts.Bounds
) -> Iterator[_Pair]:
    if settings.hash is None and settings.embedding is None:
        return
    for _, _, batch in batches(candidates, *_COLUMNS):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            if not verdicts.judged_again(row, thresholds, bounds)[0]:
                continue
            evidence = json.loads(row["evidence"])
            hashes, codes = (), ()
            if settings.hash is not None:
                hashes = [int(code, 16) for code in _both(row["id"], evidence, "hashes")]
            if settings.embedding is not None:
                codes = [unpack(code) for code in _both(row["id"], evidence, "embeddings")]
            yield _Pair(row["id"], row["grid_id"], hashes, codes)


def _both(name: str, evidence: dict[str, Any], key: str) -> tuple[str, str]:
    """Return the stored values of both panels, reference and target."""
    values = evidence.get(key)
    if values is None:
        how = "Set curate.duplicates and curate again with another --out."
        raise UserError("run_mismatch", f"The evidence of {name} has no {key}. {how}")
    return values["reference"], values["target"]


def _blocks(pairs: Iterator[_Pair]) -> Iterator[list[_Pair]]:
    while block := list(islice(pairs, BLOCK)):
        yield block


def _stacked(pairs: Sequence[_Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings of the references and of the targets, each (N, D)."""
    references, targets = zip(*(pair.codes for pair in pairs), strict=True)
    return np.stack(references), np.stack(targets)


class HashTable:
    """Earlier pairs, indexed by parts of their reference's hash.

    The 64 bits are split into `bits + 1` bands. Two hashes that differ in at most `bits` places agree in at least one
    band, so comparing the pairs in the bucket of a band finds all of them.
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
        """Add a pair after all others."""
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
        """Return the name of the earliest pair whose panels both differ in at most `bits` bits; None without one."""
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


def pack(embedding: np.ndarray) -> str:
    """Return an embedding (D,) of any length as base64 of D signed bytes.

    Cosines of packed embeddings are off by less than 0.002 (in the tests). A product of two is a sum of whole numbers,
    exact in float32, so a verdict does not depend on the machine, its threads, or the number of rows compared at once.
    """
    largest = float(np.abs(embedding).max(initial=0.0))
    scaled = np.round(embedding * (LEVELS / largest)) if 0 < largest < np.inf else np.zeros(len(embedding))
    return base64.b64encode(scaled.astype(np.int8).tobytes()).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """Return the embedding of `pack`, int8 (D,)."""
    return np.frombuffer(base64.b64decode(text), dtype=np.int8)


def alike(a: np.ndarray, b: np.ndarray, least: float) -> np.ndarray:
    """Return which rows of `a` (N, D) and `b` (M, D), int8, have a cosine of at least `least`: bool (N, M)."""
    one, two = a.astype(np.float32), b.astype(np.float32)
    lengths = np.sqrt(np.outer((one**2).sum(1, dtype=np.float64), (two**2).sum(1, dtype=np.float64)))
    return (lengths > 0) & (one @ two.T >= least * lengths)


class Vectors:
    """Earlier pairs by the embeddings of their panels, 2·D bytes each."""

    def __init__(self, least: float) -> None:
        self.least = least
        self._pairs = np.empty((2, 0, 0), np.int8)  # references and targets
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, reference: np.ndarray, target: np.ndarray) -> None:
        """Add a pair, two int8 (D,), after all others."""
        if self._count == self._pairs.shape[1]:
            more = np.empty((2, max(1024, self._count), len(reference)), np.int8)
            self._pairs = np.concatenate([self._pairs, more], axis=1) if self._count else more
        self._pairs[0, self._count], self._pairs[1, self._count] = reference, target
        self._count += 1

    def first(self, references: np.ndarray, targets: np.ndarray, since: int = 0) -> np.ndarray:
        """Return the number of the earliest pair, from `since` on, whose panels are both similar, for each row.

        References and targets are int8 (B, D). The result is (B,); -1 means none.
        """
        numbers = np.full(len(references), -1)
        for start in range(since, self._count, ROWS):
            left = np.flatnonzero(numbers < 0)
            known = self._pairs[:, start : min(start + ROWS, self._count)]
            both = alike(references[left], known[0], self.least)
            some = both.any(1)  # few rows; the targets of the others need not be compared
            both[some] &= alike(targets[left[some]], known[1], self.least)
            hit = both.any(1)
            numbers[left[hit]] = start + both[hit].argmax(1)
        return numbers


@dataclass(frozen=True)
class PanelHashes:
    """The perceptual hashes of a panel and of its mirror image."""

    hash: str
    mirrored: str


def hash_both(panel: Image) -> PanelHashes:
    """Return the hashes of a panel and of its mirror image."""
    from PIL import Image as PIL

    return PanelHashes(panel_hash(panel), panel_hash(panel.transpose(PIL.Transpose.FLIP_LEFT_RIGHT)))


def measure(one: PanelHashes, other: PanelHashes, similarity: float) -> dict[str, float]:
    """Measure how similar two panels are.

    `hash` and `mirrored` are the numbers of bits, of 64, in which their hashes differ, as they are and with one panel
    mirrored (the smaller of both directions). `embedding` is the cosine similarity of their embeddings.
    """
    mirrored = min(_bits(one.hash, other.mirrored), _bits(one.mirrored, other.hash))
    return {"hash": _bits(one.hash, other.hash), "mirrored": mirrored, "embedding": round(similarity, DIGITS)}


def _bits(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()
