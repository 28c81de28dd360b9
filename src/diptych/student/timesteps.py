"""FLUX's timesteps: how far a resolution shifts them, and their frequencies correctly rounded.

The rounding removes the largest difference between two machines' pictures.

The embedding takes sin and cos of `1000·sigma·f`, so one unit in the last place of f (float32) becomes 6e-5 in the
phase. f is an `exp`, which float32 libraries may round either way. Measured on one CPU against the release's fixture
(tests/fixtures): with torch's own exp, off there at 3 of 128 frequencies, final latents differ by 5e-5 (9e-5 guided);
with correctly rounded ones by 8e-6 (1e-5 guided), which is as near as a float64 run comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.pipelines.flux.pipeline_flux_control import calculate_shift


def shift_exponent(scheduler: Mapping[str, Any], tokens: int) -> float | None:
    """FLUX's μ for a canvas of `tokens`: timesteps are shifted by e^μ. None for a scheduler with one fixed shift.

    `scheduler` is its config, with diffusers' keys and FLUX.1-dev's values for those that are missing.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return None
    known = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return calculate_shift(tokens, *(scheduler.get(key, value) for key, value in known.items()))


class ExactTimesteps(torch.nn.Module):
    """diffusers' `Timesteps` with `exp` evaluated in float64. (B,) to (B, num_channels), float32; no parameters."""

    def __init__(self, stock: Timesteps):
        super().__init__()
        self.stock = stock
        half = stock.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - stock.downscale_freq_shift)
        # No buffer: casting the model to bfloat16 must leave the frequencies alone.
        self.frequencies = [float(f) for f in torch.exp(exponent.double())]

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=timesteps.device)
        phase = self.stock.scale * (timesteps[:, None].float() * frequencies)
        parts = [torch.cos(phase), torch.sin(phase)]
        return torch.cat(parts if self.stock.flip_sin_to_cos else parts[::-1], dim=-1)


@contextmanager
def exact_timesteps(transformer: torch.nn.Module) -> Iterator[None]:
    """Within it, a stock FLUX transformer uses `ExactTimesteps`; afterwards it is as it was."""
    embed = getattr(transformer, "time_text_embed", None)
    stock = getattr(embed, "time_proj", None)
    if embed is None or type(stock) is not Timesteps or stock.num_channels % 2:
        yield  # something else was put there on purpose
        return
    embed.time_proj = ExactTimesteps(stock)
    try:
        yield
    finally:
        embed.time_proj = stock
