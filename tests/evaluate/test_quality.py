"""Scores of what CP and PF do not see: retrieval, traits, sharpness, kernel distance."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diptych.evaluate import suites
from diptych.evaluate.scoring import quality, truth
from diptych.judges.attributes import AttributeReader
from diptych.judges.embedding import EmbeddingJudge
from diptych.pocket import world

FIXTURES = Path(__file__).parents[1] / "fixtures"
SUITE = suites.load("pocket")
SUBJECTS = 20


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return AttributeReader.load("pocket")


@pytest.fixture(scope="module")
def renders() -> list[Image.Image]:
    return truth.targets(truth.known(SUITE, "check", "identities", 60))


def panels(row: int) -> list[Image.Image]:
    """Six images of one student in `decoders.png`: row 0 through a decoder that makes specks, row 1 a better one."""
    sheet = Image.open(FIXTURES / "decoders.png").convert("RGB")
    return [sheet.crop((x, 64 * row, x + 64, 64 * row + 64)) for x in range(0, sheet.width, 64)]


def test_sharpness_falls_with_blur_and_rises_with_specks(renders):
    plain = np.mean([quality.sharpness(image) for image in renders])
    blurred = np.mean([quality.sharpness(image.filter(ImageFilter.GaussianBlur(0.7))) for image in renders])
    noise = np.random.default_rng(0).integers(-20, 21, (64, 64, 3))
    specks = [Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)) for image in renders]
    assert blurred < 0.7 * plain
    assert np.mean([quality.sharpness(image) for image in specks]) > 1.5 * plain


def test_sharpness_of_a_single_bright_pixel_is_known():
    pixels = np.zeros((5, 5), np.uint8)
    pixels[2, 2] = 90
    assert quality.sharpness(Image.fromarray(pixels)) == pytest.approx((4 * 90 + 4 * 90) / 9)


def test_kernel_distance_of_two_halves_is_zero_and_of_blur_is_not(reader, renders):
    features = reader.texture(renders)
    value, (low, high) = quality.kernel_distance(features[:30], features[30:], np.arange(30))
    assert low < 0 < high and abs(value) < 0.3
    blurred = reader.texture([image.filter(ImageFilter.GaussianBlur(1.2)) for image in renders[:30]])
    far, (low, _) = quality.kernel_distance(blurred, features[30:], np.arange(30))
    assert far > value and low > 0


def test_the_kernel_distance_and_its_interval_agree_with_a_plain_computation():
    rng = np.random.default_rng(3)
    first, second, groups = rng.normal(0.4, 1, (9, 4)), rng.normal(0, 1, (7, 4)), np.repeat([5, 2, 8], 3)

    def plain(rows: np.ndarray) -> float:
        a, b = ((x - second.mean(0)) / second.std(0) for x in (rows, second))

        def mean(x: np.ndarray, y: np.ndarray, same: bool) -> float:
            return float(
                np.mean([(u @ v / 4 + 1) ** 3 for i, u in enumerate(x) for j, v in enumerate(y) if i != j or not same])
            )

        return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)

    value, (low, high) = quality.kernel_distance(first, second, groups)
    assert value == pytest.approx(plain(first), abs=1e-3)
    without = np.array([plain(first[groups != g]) for g in (2, 5, 8)])
    half = 1.959964 * np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert (low, high) == pytest.approx((value - half, value + half), abs=1e-3)


@pytest.mark.parametrize("images", [(1, 5, 1), (5, 1, 5), (5, 5, 1)])
def test_a_kernel_distance_of_too_few_images_is_refused(images):
    first, second, groups = images
    with pytest.raises(ValueError, match="two"):
        quality.kernel_distance(np.ones((first, 3)), np.ones((second, 3)), np.arange(first) % groups)


def test_the_kernel_distance_prefers_the_decoder_without_specks(reader, renders):
    real, six = reader.texture(renders), np.arange(6)
    specks, clean = (quality.kernel_distance(reader.texture(panels(row)), real, six)[0] for row in (0, 1))
    assert clean < 0.9 * specks


def test_a_true_image_finds_its_reference_among_ten_and_another_subject_does_not():
    embed = EmbeddingJudge.load("pocket", "scorer").embed
    samples = [sample for sample in SUITE.samples(SUBJECTS, 1) if sample.split == "identities"]
    own = embed([SUITE.reference_image(sample) for sample in samples])
    found = {}
    for name, images in (
        ("truth", [SUITE.truth(sample) for sample in samples]),
        ("other", [SUITE.other(sample) for sample in samples]),
    ):
        hits = []
        for sample, mine, image in zip(samples, own, embed(images), strict=True):
            rivals = embed(SUITE.rivals(sample.split, sample.identity, quality.GALLERY - 1))
            hits.append(quality.retrieved(float(mine @ image), rivals @ image))
        found[name] = np.mean(hits)
    assert found["truth"] >= 0.9
    assert found["other"] <= 0.4


def test_rivals_are_other_subjects_of_the_kind_in_the_scene_of_the_reference():
    sample = SUITE.samples(3, 1)[1]
    rivals = SUITE.rivals(sample.split, sample.identity, 4)
    again = SUITE.rivals(sample.split, sample.identity, 4)
    assert [image.tobytes() for image in rivals] == [image.tobytes() for image in again]
    reference = np.asarray(SUITE.reference_image(sample), int)
    assert len({image.tobytes() for image in (*rivals, SUITE.reference_image(sample))}) == 5
    for image in rivals:  # the corners show the scene alone
        np.testing.assert_array_equal(np.asarray(image, int)[:6, :6], reference[:6, :6])


def test_traits_are_compared_by_name_and_unknown_ones_left_out():
    true = {"pattern": "spots", "second": "red", "eyes": "2"}
    assert quality.traits(true, {"pattern": "spots", "eyes": "1", "place": "beach"}) == {"pattern": True, "eyes": False}
    assert quality.traits(true, {"place": "beach"}) == {}


@pytest.mark.parametrize(
    ("second", "pattern", "name"),
    [
        ((1.0, 0.1, 0.1), "spots", "red"),
        ((0.1, 0.1, 1.0), "half", "blue"),
        ((0.95, 0.9, 0.9), "belly", "pale"),
        ((0.4, 0.08, 0.08), "checks", "dark"),
        ((1.0, 0.1, 0.1), "plain", "none"),
        ((1.0, 0.1, 0.2), "spots", "red"),
    ],
)
def test_the_second_color_has_a_name(second, pattern, name):
    subject = world.sample_identity(np.random.default_rng(0))
    changed = type(subject)(**{**subject.__dict__, "second": second, "pattern": pattern})
    assert world.traits(changed)["second"] == name
    assert set(world.traits(changed)) == set(world.TRAITS)


def test_every_sampled_subject_has_known_traits():
    rng = np.random.default_rng(1)
    for _ in range(300):
        for group, value in world.traits(world.sample_identity(rng)).items():
            assert value in world.TRAITS[group]
