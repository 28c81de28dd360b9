"""Holds a part of the right panel to a known picture while the rest is drawn: inpainting without training.

After each step the held part is put where rectified flow's path to the picture has it, x(t) = (1 − t)·z + t·ε, so that
what is drawn beside it fits it from the first step on. Given to a student as diffusers' `callback_on_step_end`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diptych.student.canvas import Canvas, join_panels, pack, to_pixels

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from diptych.student.pipeline import DiptychPipeline


class Hold:
    """For one picture. `picture` is of the panel's size; `kept` (H, W) is true where it is held."""

    def __init__(
        self, pipeline: DiptychPipeline, picture: Image.Image, kept: np.ndarray, canvas: Canvas, seed: int
    ) -> None:
        pixels = to_pixels(picture)[None]
        self.clean = pipeline.encode_canvas(join_panels(pixels, pixels))  # (1, tokens, 4C)
        self.noise = pipeline.noise([seed], canvas)
        self.held = held_latents(kept, canvas, self.clean.shape[-1] // 4)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The latents after step number `step`, the held part put in place."""
        x_t = tensors["latents"]
        clean, noise, held = (x.to(x_t.device) for x in (self.clean, self.noise, self.held))
        sigma = pipe.scheduler.sigmas[step + 1].to(x_t.device)
        return {"latents": torch.where(held, ((1 - sigma) * clean + sigma * noise).to(x_t.dtype), x_t)}


def held_latents(kept: np.ndarray, canvas: Canvas, channels: int) -> torch.Tensor:
    """Boolean packed latents (1, tokens, 4C): those of the right panel of which every pixel is kept."""
    free = torch.from_numpy(~kept)[None, None].float()
    held = torch.nn.functional.max_pool2d(free, canvas.factor) == 0  # (1, 1, 2R, K)
    both = join_panels(torch.zeros_like(held), held)
    return pack(both.expand(-1, channels, -1, -1))
