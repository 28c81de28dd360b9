"""Embeddings as a few bytes, and a table of earlier pairs that finds those whose two panels are both alike.

    text = pack(embedding)                         # what evidence keeps
    table = Vectors(0.95)
    table.add(unpack(reference), unpack(target))
    table.first(references, targets)               # of each row the earliest pair in the table, -1 if none

An embedding is kept as whole numbers from -127 to 127, a byte each: cosines are off by less than 0.002 (in the tests),
and a product of two is a sum of whole numbers, exact in float32. So a verdict does not depend on the machine, its
threads, or how many rows are compared at once.
"""

from __future__ import annotations

import base64

import numpy as np

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
