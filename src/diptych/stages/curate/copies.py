"""Copies that pixels do not show: panels that are one picture in another brightness or tint, mirrored, or drawn anew.

    measure(look(reference), look(target), similarity=0.93)      # {"hash": 22, "mirrored": 3, "embedding": 0.93}

`alignment.copy_distance` finds a copy that lies pixel on pixel. What is left over is found here, if a recipe asks
(`curate.copies`): by perceptual hashes, which see shapes in grey and no brightness, and by the judge's embeddings,
which see what is shown. A student that learns from such a pair learns to give its reference back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diptych.stages.curate.duplicates import panel_hash

if TYPE_CHECKING:
    from PIL.Image import Image

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
