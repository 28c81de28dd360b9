"""How like two pictures are, where the true one is known: PSNR, SSIM, and a distance of features.

Pictures are arrays (N, H, W, 3), float in 0..1. Small enough to be our own, so that a report's numbers need no extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BEST_PSNR = 60.0  # decibels of equal pictures, so that a mean stays finite
WINDOW, SIGMA = 11, 1.5  # pixels, as in the paper of SSIM
C1, C2 = 0.01**2, 0.03**2


def arrays(images: Sequence[Image]) -> np.ndarray:
    """PIL images of one size as float64 (N, H, W, 3) in 0..1."""
    return np.stack([np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in images])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio (N,) in decibels, at most `BEST_PSNR`."""
    error = ((a - b) ** 2).mean((1, 2, 3))
    return np.minimum(-10 * np.log10(np.maximum(error, 1e-12)), BEST_PSNR)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (N,), 1 for equal pictures (Wang et al. 2004), the mean of the three colour channels.

    Where the whole window lies inside the picture, as in the authors' code. ValueError below 11 pixels a side.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM looks through a window of {WINDOW} pixels; the pictures have {a.shape[1]}×{a.shape[2]}")
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a, var_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    both = _smooth(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * both + C2) / (var_a + var_b + C2)
    return (luminance * structure).mean((1, 2, 3))


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """Gaussian windows (N, H, W, C) → (N, H − 10, W − 10, C)."""
    weights = np.exp(-0.5 * (np.arange(WINDOW) - WINDOW // 2) ** 2 / SIGMA**2)
    weights /= weights.sum()
    for axis in (1, 2):
        pixels = np.lib.stride_tricks.sliding_window_view(pixels, WINDOW, axis) @ weights  # pyright: ignore
    return pixels


def feature_distance(judge: Any, a: Sequence[Image], b: Sequence[Image]) -> np.ndarray:
    """Distance (N,) of two pictures in an embedding judge's feature maps, 0 for equal ones.

    LPIPS without its learnt weights (Zhang et al. 2018): at each stage of the network every position's features are
    brought to length 1 and their squared difference is averaged over positions; then the mean of the stages.
    """
    import torch

    found: list[np.ndarray] = []
    for one, two in zip(judge.vision.batches(a), judge.vision.batches(b), strict=True):
        maps = [
            judge.vision.model(pixel_values=pixels, output_hidden_states=True).hidden_states for pixels in (one, two)
        ]
        stages = []
        for first, second in zip(*maps, strict=True):
            # A transformer's (B, positions, C), or a convolutional network's (B, C, h, w).
            axis = 1 if first.ndim == 4 else 2
            first, second = (torch.nn.functional.normalize(x.float(), dim=axis) for x in (first, second))
            stages.append(((first - second) ** 2).sum(axis).flatten(1).mean(1))
        found.append(torch.stack(stages).mean(0).cpu().numpy())
    return np.concatenate(found)
