"""Seams: found where there are some, not seen where there are none, and panels cut there to the pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diptych.stages.curate import seams

Pairs = list[tuple[np.ndarray, np.ndarray]]


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Like a decoder's softness."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def strength(pixels: np.ndarray) -> float:
    height, width, _ = pixels.shape
    return seams.find_seam(pixels, width // 2, height).strength


def singles(count: int, size: int = 64) -> list[np.ndarray]:
    """Single wide pictures (size, 2·size, 3): the middle of a large render, or a small one made wide."""
    from diptych.pocket import world
    from diptych.pocket.render import render

    pictures = []
    for index in range(count):
        rng = np.random.default_rng([9, index])
        who, scene = world.sample_identity(rng), world.sample_scene(rng)
        if index % 2:
            pictures.append(render(who, scene, 2 * size)[size // 2 : size // 2 + size])
        else:
            small = Image.fromarray(render(who, scene, size))
            pictures.append(np.asarray(small.resize((2 * size, size), Image.Resampling.BICUBIC)))
    return pictures


@pytest.mark.parametrize("radius", [0.0, 0.8])
def test_grids_have_a_seam_and_single_pictures_have_none(
    radius: float, subject_panels: Pairs, relit_panels: Pairs
) -> None:
    def share(pictures: list[np.ndarray]) -> float:
        return float(np.mean([strength(blurred(picture, radius)) >= 0 for picture in pictures]))

    assert share([np.concatenate(pair, 1) for pair in subject_panels]) >= 0.99
    assert share([np.concatenate(pair, 1) for pair in relit_panels]) >= 0.9
    assert share(singles(150)) <= 0.02


def test_large_textured_panels_work_as_well(subject_panels: Pairs) -> None:
    rng = np.random.default_rng(0)

    def large(pixels: np.ndarray) -> np.ndarray:
        # 512 px a panel, the seam sharp, under a texture stronger than most seams' last bits
        return np.clip(np.kron(pixels, np.ones((8, 8, 1))) + rng.normal(0, 12, (512, 1024, 1)), 0, 255).astype(np.uint8)

    grids = [strength(large(np.concatenate(pair, 1))) for pair in subject_panels[:12]]
    wide = [strength(large(picture)) for picture in singles(12)]
    assert min(grids) > 0 > max(wide)


def test_a_grid_without_contrast_has_no_seam_and_a_tiny_one_is_none() -> None:
    assert strength(np.full((64, 128, 3), 90, np.uint8)) < 0
    assert strength(np.zeros((4, 8, 3), np.uint8)) == -1


def test_an_even_grid_is_cut_to_its_very_pixels(subject_panels: Pairs) -> None:
    for left, right in subject_panels[:100]:
        found = seams.cut(Image.fromarray(np.concatenate([left, right], 1)), 1, 2, 64)
        assert [seam.at for seam in found.seams] == [64] and found.seams[0].offset == 0
        assert np.array_equal(np.asarray(found.panels[0]), left) and np.array_equal(np.asarray(found.panels[1]), right)


@pytest.mark.parametrize("offset", [-4, -2, 3])
def test_a_seam_off_the_middle_is_found(offset: int, subject_panels: Pairs) -> None:
    found = []
    for left, right in subject_panels[:80]:
        wide = np.asarray(Image.fromarray(right).resize((64 - offset, 64)))
        narrow = np.asarray(Image.fromarray(left).resize((64 + offset, 64)))
        cut = seams.cut(Image.fromarray(np.concatenate([narrow, wide], 1)), 1, 2, 64)
        assert [panel.size for panel in cut.panels] == [(64, 64)] * 2
        found.append(cut.seams[0].offset == offset)
    assert np.mean(found) >= 0.9


def test_four_panels_come_in_reading_order_and_the_weakest_seam_counts(subject_panels: Pairs) -> None:
    (a, b), (c, d) = subject_panels[:2]
    image = Image.fromarray(np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)], 0))
    cut = seams.cut(image, 2, 2, 64)
    assert all(np.array_equal(np.asarray(p), q) for p, q in zip(cut.panels, (a, b, c, d), strict=True))
    assert [seam.axis for seam in cut.seams] == ["x", "y"] and cut.strength == min(s.strength for s in cut.seams)
    assert cut.strength > 0
