"""Copies are near, other scenes far; relit panels align, moved ones do not."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diptych.recipe import tasks
from diptych.recipe.schema import Thresholds
from diptych.stages.curate.alignment import FINE, copy_distance, structural_fit, whole_change
from diptych.stages.curate.stage import compare

Pairs = list[tuple[np.ndarray, np.ndarray]]
NEAR = Thresholds().near_copy


def moved(pixels: np.ndarray, dx: int, dy: int) -> np.ndarray:
    wide = np.pad(pixels, ((8, 8), (8, 8), (0, 0)), mode="edge")
    return np.roll(wide, (dy, dx), (0, 1))[8:-8, 8:-8]


def zoomed(pixels: np.ndarray, share: float) -> np.ndarray:
    """The middle `share` of a picture, enlarged to its size."""
    height, width = pixels.shape[:2]
    box = (width * (1 - share) / 2, height * (1 - share) / 2, width * (1 + share) / 2, height * (1 + share) / 2)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))


def encoded(pixels: np.ndarray, quality: int = 75) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def brighter(pixels: np.ndarray, by: float) -> np.ndarray:
    return np.clip(pixels * by, 0, 255).astype(np.uint8)


COPIES = {
    "the same": lambda p: p,
    "shifted by 2 px": lambda p: moved(p, 2, 0),
    "shifted by (-5, 3) px": lambda p: moved(p, -5, 3),
    "encoded again": encoded,
    "6 % brighter": lambda p: brighter(p, 1.06),
    "blurred": lambda p: np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(0.8))),
    "zoomed by a tenth": lambda p: np.asarray(Image.fromarray(p).crop((3, 3, 61, 61)).resize((64, 64))),
    "shifted, encoded and brighter": lambda p: brighter(encoded(moved(p, 1, 2)), 1.05),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_copy_is_near(change: str, subject_panels: Pairs) -> None:
    distances = [
        copy_distance(Image.fromarray(a), Image.fromarray(COPIES[change](a))).distance for a, _ in subject_panels[:25]
    ]
    # A zoom is taken back in steps, so that one picture of very fine stripes may stay a hair above.
    assert sorted(distances)[-2] < NEAR and max(distances) < 1.05 * NEAR, f"{change}: {sorted(distances)[-2:]}"


def test_the_same_subject_in_another_scene_is_no_copy(subject_panels: Pairs) -> None:
    distances = [copy_distance(Image.fromarray(a), Image.fromarray(b)).distance for a, b in subject_panels[:100]]
    assert min(distances) > 1.2 * NEAR


def test_the_same_scene_in_another_light_is_no_copy(relit_panels: Pairs) -> None:
    distances = [copy_distance(Image.fromarray(a), Image.fromarray(b)).distance for a, b in relit_panels]
    assert np.mean(np.array(distances) >= NEAR) >= 0.98


def test_what_was_taken_back_is_told(subject_panels: Pairs) -> None:
    picture = subject_panels[0][0]
    found = copy_distance(Image.fromarray(picture), Image.fromarray(moved(picture, 4, -2)))
    assert found.shift == (4 / FINE, -2 / FINE) and found.scale == 1.0 and found.distance == pytest.approx(0, abs=1e-6)
    dark = copy_distance(Image.fromarray(brighter(picture, 0.5)), Image.fromarray(picture))
    assert dark.gain == pytest.approx(0.92) and dark.distance > NEAR


def test_large_panels_are_compared_like_small_ones(subject_panels: Pairs) -> None:
    for a, b in subject_panels[:5]:
        small, other = Image.fromarray(a), Image.fromarray(b)
        large = [image.resize((512, 512), Image.Resampling.NEAREST) for image in (small, other)]
        assert copy_distance(*large).distance == pytest.approx(copy_distance(small, other).distance, abs=1e-4)


def test_relit_panels_align_and_moved_or_foreign_ones_do_not(relit_panels: Pairs, subject_panels: Pairs) -> None:
    def aligned(a: np.ndarray, b: np.ndarray) -> bool:
        return compare(Image.fromarray(a), Image.fromarray(b), 1.0, tasks.load("relight")).aligned

    assert np.mean([aligned(a, b) for a, b in relit_panels]) >= 0.95
    assert not any(aligned(a, moved(b, 3, 0)) for a, b in relit_panels[:50])
    for share in (0.9, 0.93):  # outlines still match, but at another scale
        assert np.mean([aligned(a, zoomed(b, share)) for a, b in relit_panels[:50]]) <= 0.06
        assert np.mean([aligned(zoomed(a, share), b) for a, b in relit_panels[:50]]) <= 0.06
    # One subject, upright in the middle of two places, may well be aligned; another grid's panel is not.
    foreign = pairwise(subject_panels[:100])
    assert np.mean([aligned(a, b) for (a, _), (_, b) in foreign]) <= 0.05


def test_the_scale_of_the_outlines_is_told(relit_panels: Pairs) -> None:
    seen = [structural_fit(Image.fromarray(a), Image.fromarray(zoomed(b, 0.95))).scale for a, b in relit_panels[:20]]
    assert np.median(seen) == pytest.approx(0.95)
    assert structural_fit(Image.fromarray(relit_panels[0][0]), Image.fromarray(relit_panels[0][0])).scale == 1.0


def test_a_new_light_changes_the_whole_picture_and_a_drifted_subject_does_not(
    relit_panels: Pairs, drifted_panels: Pairs
) -> None:
    least = tasks.load("relight").curation.thresholds["change"]
    relit = np.array([whole_change(Image.fromarray(a), Image.fromarray(b)) for a, b in relit_panels])
    drifted = np.array([whole_change(Image.fromarray(a), Image.fromarray(b)) for a, b in drifted_panels])
    assert np.mean(relit >= least) >= 0.97 and np.mean(drifted >= least) <= 0.25
    assert whole_change(Image.fromarray(relit_panels[0][0]), Image.fromarray(relit_panels[0][0])) == 0
    grey = Image.new("RGB", (64, 64), (120, 120, 120))
    brighter_by_a_tenth = Image.new("RGB", (64, 64), (132, 132, 132))
    assert whole_change(grey, brighter_by_a_tenth) == pytest.approx(0.0866, abs=0.001)
