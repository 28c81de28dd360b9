"""Grids of coloured tiles, a judge of embeddings that sees their colour without torch, and what one of words says."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from diptych.data.images import image_cell


class Colours:
    """A small embedding judge that needs no torch: the mean colour, around grey."""

    fingerprint = "c" * 64

    def embed(self, images: list[Any]) -> np.ndarray:
        found = np.stack([np.asarray(image, np.float32).mean((0, 1)) - 127.5 for image in images])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(1)


def panel(red: float, seed: int) -> np.ndarray:
    """(64, 64, 3): green tiles of its own over a shade of red, blue where that is low."""
    tiles = np.random.default_rng(seed).permutation(np.linspace(0, 255, 64)).reshape(8, 8)
    shade = [np.full((64, 64), 255 * red), np.kron(tiles, np.ones((8, 8))), np.full((64, 64), 255 * (1 - red))]
    return np.stack(shade, -1).astype(np.uint8)


def grid(number: int, reds: tuple[float, ...], rows: int = 1, copied: bool = False) -> dict[str, Any]:
    panels = [panel(red, 0 if copied else 100 * number + i) for i, red in enumerate(reds)]
    cols = len(panels) // rows
    image = np.concatenate([np.concatenate(panels[r * cols : (r + 1) * cols], 1) for r in range(rows)], 0)
    row = {"id": f"g-{number:06d}", "image": image_cell(Image.fromarray(image)), "prompt_id": "p", "prompt": "grid"}
    row |= {"panels": [f"a cat on the moon {i}" for i in range(len(panels))], "subject": "cat", "task": "subject"}
    return row | {"seed": number, "rows": rows, "cols": cols, "panel_size": 64, "model": "m"}


def opinion(same: bool, confidence: int = 5) -> dict[str, Any]:
    said = {f"step_{n}": f"step {n} looked at" for n in (1, 2, 3)}
    return {**said, "same": same, "confidence": confidence, "reason": "the colour"}
