"""Previews: colours that the VAE means, taken from the latents where the sampler is heading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diptych import Student
from diptych.data.images import open_image
from diptych.student.callbacks import Preview, fit_projection
from diptych.student.canvas import Canvas, condition_canvas, to_pixels
from diptych.utils.paths import packaged


@pytest.fixture(scope="module")
def pocket():
    return Student.load("pocket", device="cpu", progress_bar=False)


def test_the_linear_map_shows_what_the_vae_would_decode(pocket):
    pipe, canvas = pocket.pipeline, pocket.canvas()
    picture = open_image(packaged("examples/references/cat.png"))
    small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX)).astype(float)
    pixels = to_pixels(picture)[None]
    tokens = pipe.encode_canvas(condition_canvas(pixels).flip(-1))  # the picture, mirrored, on the right
    preview = Preview(lambda *_: None, canvas, fit_projection(pipe))
    shown = np.asarray(preview.images(tokens)[0].resize((8, 8), Image.Resampling.BOX)).astype(float)[:, ::-1]
    assert np.corrcoef(shown.ravel(), small.ravel())[0, 1] > 0.9
    torch.testing.assert_close(fit_projection(pipe), preview.projection)


def test_a_preview_is_near_the_end_long_before_it(pocket):
    shown = {}
    reference = packaged("examples/references/cat.png")
    image = pocket.generate(
        reference, "a cat on the beach", steps=8, on_preview=lambda done, steps, images: shown.update({done: images[0]})
    )
    assert sorted(shown) == [2, 3, 4, 5, 6, 7, 8]

    def distance(a, b):
        return np.abs(np.asarray(a).astype(float) - np.asarray(b).astype(float)).mean()

    apart = [distance(shown[done], shown[8]) for done in range(2, 8)]
    assert apart[-1] < apart[0]
    assert distance(shown[8], image) < distance(Image.new("RGB", image.size, (128, 128, 128)), image)


def test_clean_latents_are_exact_for_a_straight_path():
    x_0, noise = torch.randn(2, 1, 16, 12)
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    preview = Preview(lambda *_: None, Canvas(8, 8, 1), torch.zeros(4, 3))
    preview._before = (1 - sigmas[1]) * x_0 + sigmas[1] * noise
    x_s = (1 - sigmas[2]) * x_0 + sigmas[2] * noise
    torch.testing.assert_close(preview._clean(x_s, sigmas, 1), x_0)
