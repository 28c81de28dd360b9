"""The canvas: the right panel's tokens are columns; references fit without being bent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diptych.errors import UsageError
from diptych.student.canvas import (
    BLACK,
    Canvas,
    condition_canvas,
    fit_image,
    join_panels,
    join_tokens,
    right_tokens,
    split_panels,
    split_tokens,
    to_pixels,
)
from diptych.student.families.base import pack, unpack
from raising import raises


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
def test_splitting_tokens_is_splitting_the_picture(rows, columns, batch):
    canvas = Canvas(8 * rows, 8 * columns, factor=4)
    left, right = torch.randn(2, batch, 3, 2 * rows, 2 * columns)
    tokens = pack(join_panels(left, right))
    assert tokens.shape == (batch, canvas.tokens, 12)
    torch.testing.assert_close(split_tokens(tokens, canvas)[0], pack(left))
    torch.testing.assert_close(split_tokens(tokens, canvas)[1], pack(right))
    torch.testing.assert_close(tokens[:, right_tokens(canvas)], pack(right))
    assert torch.equal(join_tokens(pack(left), pack(right), canvas), tokens)
    assert torch.equal(split_panels(unpack(tokens, canvas.size))[1], right)


def test_packing_is_that_of_diffusers():
    latents = torch.randn(2, 4, 6, 8)
    assert torch.equal(pack(latents), FluxControlPipeline._pack_latents(latents, 2, 4, 6, 8))


def test_condition_canvas_is_reference_and_black():
    reference = torch.rand(1, 3, 4, 6)
    left, right = split_panels(condition_canvas(reference))
    assert torch.equal(left, reference)
    assert (right == BLACK).all()


@pytest.mark.parametrize("size", [(0, 16), (12, 16), (16, -16), (16, 16.0), (True, 16)])
def test_sizes_that_do_not_pack_are_refused(size):
    with raises("size_invalid", "8 pixels", kind=UsageError):
        Canvas(*size, factor=4)


@pytest.mark.parametrize(
    ("value", "near"),
    [(3, "Try 8."), (12, "Try 8 or 16."), (515, "Try 512 or 520."), (16.0, "Try 16."), ("x", "Try 8.")],
)
def test_the_sizes_that_would_pack_are_named(value, near):
    with raises("size_invalid", near, kind=UsageError):
        Canvas(16, value, factor=4)


@pytest.mark.parametrize("fit", ["crop", "pad", "contain"])
@pytest.mark.parametrize("size", [(30, 10), (10, 30), (3, 200), (16, 16), (64, 64)])
def test_every_fit_gives_the_panel(fit, size):
    assert fit_image(Image.new("RGB", size, (9, 90, 200)), 16, 24, fit).size == (24, 16)


def test_fits_differ_in_what_they_do_with_the_rest():
    wide = Image.new("RGB", (40, 10), (200, 0, 0))
    corner = {fit: fit_image(wide, 20, 20, fit).getpixel((0, 0)) for fit in ("crop", "pad", "contain")}
    assert corner == {"crop": (200, 0, 0), "pad": (255, 255, 255), "contain": (200, 0, 0)}
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    assert fit_image(picture, 10, 10).tobytes() == picture.tobytes()  # nothing is resampled without need
    with raises("option_invalid", "'contain'", kind=UsageError):
        fit_image(wide, 20, 20, "contained")


def test_a_picture_of_any_mode_is_fitted_upright_over_white():
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    assert fit_image(clear, 4, 8).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (8, 4))
    turned.getexif()[0x0112] = 6
    turned.putpixel((0, 3), (255, 255, 255))
    assert fit_image(turned, 8, 4).getpixel((0, 0)) == (255, 255, 255)


def test_pixels_are_in_the_range_of_the_vae():
    pixels = to_pixels(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
    torch.testing.assert_close(pixels.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
