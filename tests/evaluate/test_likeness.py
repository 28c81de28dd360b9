"""PSNR, SSIM and the distance of features, against what they are defined to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.evaluate.scoring import metrics
from diptych.pocket import world
from diptych.pocket.render import render
from diptych.pocket.world import PANEL


@pytest.fixture(scope="module")
def renders() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(render(world.sample_identity(rng), world.sample_scene(rng))) for _ in range(6)]


def test_psnr_is_decibels_of_the_mean_squared_error() -> None:
    a = np.zeros((2, 16, 16, 3))
    b = a + np.array([0.1, 0.0]).reshape(2, 1, 1, 1)
    assert metrics.psnr(a, b) == pytest.approx([20.0, metrics.BEST_PSNR])


def test_ssim_is_the_paper_s_formula(renders: list[Image.Image]) -> None:
    a, b = metrics.arrays(renders[:1]), metrics.arrays(renders[1:2])
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for y in range(PANEL - 10):
        for x in range(PANEL - 10):
            for c in range(3):
                p, q = a[0, y : y + 11, x : x + 11, c], b[0, y : y + 11, x : x + 11, c]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                both = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                found.append(both / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert metrics.ssim(a, b)[0] == pytest.approx(np.mean(found), abs=1e-9)
    assert metrics.ssim(a, a)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="window of 11"):
        metrics.ssim(a[:, :8], b[:, :8])


def test_features_are_further_apart_the_more_an_image_changes(renders: list[Image.Image]) -> None:
    from diptych.judges.embedding import EmbeddingJudge

    judge: Any = EmbeddingJudge.load("pocket", "scorer")
    darker = [Image.fromarray((np.asarray(image) * 0.9).astype(np.uint8)) for image in renders]
    same, near, far = (
        metrics.feature_distance(judge, renders, other) for other in (renders, darker, renders[1:] + renders[:1])
    )
    assert same.shape == (6,) and same.max() < 1e-6
    assert near.min() > 0 and (near < far).all()
