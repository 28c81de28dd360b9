"""Callbacks of the sampler (diffusers' `callback_on_step_end`): live previews, and inpainting.

`Preview` shows the image in progress, from the latents alone. Flow matching's clean latents follow from two consecutive
states: x_0 = x_s − σ_s·v with the sampler's last velocity v = (x_s − x_t) / (σ_s − σ_t). A linear map takes their C
channels to RGB. It is fitted once, by least squares, to the VAE's latents of random colors at several scales. A preview
then costs one small matrix product, without the decoder.

`Hold` keeps a part of the right panel at a known image while the rest is generated: inpainting without training. After
each step, the known part is set to its place on rectified flow's path to the image, so that the rest matches it from
the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from diptych.student.canvas import Canvas, join_panels, split_panels, to_pixels
from diptych.student.families.base import Size, pack, unpack
from diptych.student.sampler import Callback, on_path

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from diptych.student.reference_pipeline import ReferencePipeline

Show = Callable[[int, int, "list[Image]"], None]  # (steps done, number of steps, one image for each of the batch)
FIT_COLORS = (4, 8, 16, 32)  # random colors along a side of the fitting images, because detail has other channels
FIT_IMAGES = 4  # of each
FIT_LATENTS = 16  # side of a fitting image, in latents


def fit_projection(pipe: ReferencePipeline) -> torch.Tensor:
    """A matrix (C + 1, 3) from scaled latents of the pipeline's VAE, and a constant 1, to RGB in [-1, 1]. Fitted by
    least squares with a fixed seed."""
    factor, side = pipe.vae_scale_factor, FIT_LATENTS
    generator = torch.Generator("cpu").manual_seed(0)
    colors = [2 * torch.rand(FIT_IMAGES, 3, n, n, generator=generator) - 1 for n in FIT_COLORS]
    size = (factor * side, factor * side)
    pixels = torch.cat([F.interpolate(each, size, mode="bilinear", align_corners=True) for each in colors])
    latents = unpack(pipe.encode_canvas(pixels).float().cpu(), Size(side // 2, side // 2))
    means = F.avg_pool2d(pixels, factor).movedim(1, -1).reshape(-1, 3)
    return torch.linalg.lstsq(_with_one(latents).reshape(-1, latents.shape[1] + 1), means).solution


class Preview:
    """A `callback_on_step_end` that shows the target panels and changes nothing.

    Calls `show(done, steps, images)` after the last step and after every `every`-th step from the second on, because a
    velocity needs two states. `projection` comes from `fit_projection`. Only for schedulers with `sigmas` (FLUX's).
    """

    def __init__(self, show: Show, canvas: Canvas, projection: torch.Tensor, every: int = 1) -> None:
        self.show = show
        self.canvas = canvas
        self.projection = projection
        self.every = max(1, every)
        self._before: torch.Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        x_s: torch.Tensor = tensors["latents"].detach().float()
        done, steps = step + 1, pipe.num_timesteps
        last = done == steps
        if last or (self._before is not None and done % self.every == 0):
            self.show(done, steps, self.images(self._clean(x_s, pipe.scheduler.sigmas, step)))
        self._before = None if last else x_s
        return {}

    def _clean(self, x_s: torch.Tensor, sigmas: torch.Tensor, step: int) -> torch.Tensor:
        """x_0 (B, tokens, 4C) from the step from σ_t = sigmas[step] to σ_s = sigmas[step + 1]."""
        if self._before is None:
            return x_s
        sigma_t, sigma_s = (float(sigma) for sigma in sigmas[step : step + 2])
        return x_s - sigma_s * (x_s - self._before) / (sigma_s - sigma_t)

    def images(self, tokens: torch.Tensor) -> list[Image]:
        """Target panels of canvas tokens (B, tokens, 4C), enlarged to the panel's size."""
        from PIL import Image

        latents = unpack(tokens.cpu(), self.canvas.size)
        pixels = _with_one(split_panels(latents, self.canvas.panels)[1]) @ self.projection
        arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        size = (self.canvas.panel_width, self.canvas.panel_height)
        return [Image.fromarray(array).resize(size, Image.Resampling.BILINEAR) for array in arrays]


def in_turn(callbacks: Sequence[Callback]) -> Callback:
    """Several `callback_on_step_end`s as one. Each gets the changes of those before it."""

    def call(
        pipe: ReferencePipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        changed: dict[str, torch.Tensor] = {}
        for callback in callbacks:
            changed |= callback(pipe, step, timestep, tensors | changed) or {}
        return changed

    return call


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) to (B, h, w, C + 1), the last a constant 1."""
    last = latents.movedim(1, -1)
    return torch.cat([last, torch.ones_like(last[..., :1])], dim=-1)


class Hold:
    """A callback for one image. `picture` has the panel's size; `kept` (H, W) is true where it is kept."""

    def __init__(
        self, pipeline: ReferencePipeline, picture: Image, kept: np.ndarray, canvas: Canvas, seed: int
    ) -> None:
        pixels = to_pixels(picture)[None]
        self.clean = pipeline.encode_canvas(join_panels(pixels, pixels, canvas.panels))  # (1, tokens, 4C)
        self.noise = pipeline.noise([seed], canvas)
        self.held = held_latents(kept, canvas, self.clean.shape[-1] // 4)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The latents after step `step`, with the known part in its place."""
        x_t = tensors["latents"]
        clean, noise, held = (x.to(x_t.device) for x in (self.clean, self.noise, self.held))
        sigma = pipe.scheduler.sigmas[step + 1].to(x_t.device)
        return {"latents": torch.where(held, on_path(clean, noise, sigma).to(x_t.dtype), x_t)}


def held_latents(kept: np.ndarray, canvas: Canvas, channels: int) -> torch.Tensor:
    """A mask of packed latents (1, tokens, 4C): those of the right panel of which every pixel is kept."""
    free = torch.from_numpy(~kept)[None, None].float()
    held = torch.nn.functional.max_pool2d(free, canvas.factor) == 0  # (1, 1, 2R, K)
    both = join_panels(torch.zeros_like(held), held, canvas.panels)
    return pack(both.expand(-1, channels, -1, -1))
