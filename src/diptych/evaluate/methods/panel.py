"""One panel's flow matching: how the baselines that train go on training the teacher as it is.

With clean latents x_0, noise ε and noise level σ: x_t = (1 − σ)·x_0 + σ·ε, and the model answers ε − x_0. Shapes: B
batch, N tokens of a panel, C channels of a token, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from diptych.evaluate.methods.baselines import open_teacher
from diptych.student.canvas import Canvas
from diptych.train.buckets import timestep_shift

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe


def loss(
    transformer: Any,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
    guidance: float | None = None,
    attention: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Mean squared velocity error of each sample, (B,), float32.

    `clean` and `noise` (B, N, C); `sigma` (B,); `text` is (B, L, D) and (B, P); `ids` (N, 3); `guidance` is what a
    guidance-distilled transformer is told, None for another; `attention` goes to the attention processors.
    """
    level = sigma[:, None, None]
    embeds, pooled = text
    (velocity,) = transformer(
        hidden_states=(1 - level) * clean + level * noise,
        timestep=sigma,
        guidance=None if guidance is None else torch.full_like(sigma, guidance),
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=ids.new_zeros(embeds.shape[1], 3),
        img_ids=ids,
        joint_attention_kwargs=attention,
        return_dict=False,
    )
    return (velocity.float() - (noise - clean)).square().mean(dim=(1, 2))


def canvas(pipe: Any, height: int, width: int) -> Canvas:
    """One panel of this size in pixels, alone."""
    return Canvas(height, width, pipe.vae_scale_factor, panels=1)


def teacher(recipe: Recipe) -> tuple[Any, str]:
    """The recipe's teacher to train on, whole and frozen in what training computes in; and that, by name."""
    from diptych.utils.machine import pick_device, pick_precision

    precision, _ = pick_precision(recipe.distill.precision, pick_device(recipe.device))
    pipe = open_teacher(recipe, precision)
    pipe.transformer.requires_grad_(False)
    return pipe, precision


def shift(pipe: Any, canvas: Canvas, asked: float | str) -> float:
    """`distill.shift` as a number: for `auto`, what the teacher samples one panel with."""
    return timestep_shift(pipe, canvas) if asked == "auto" else float(asked)


def panel_size(pipe: Any, asked: int | None) -> int:
    """Side of a panel in pixels: `paint.panel_size`, or what the teacher's VAE was made for, 512 at most."""
    return asked or min(512, int(pipe.vae.config.sample_size))


@torch.no_grad()
def encode_text(pipe: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, L, D) and pooled embeddings (B, P) of a stock FluxPipeline."""
    length = min(512, int(pipe.tokenizer_2.model_max_length))
    embeds, pooled, _ = pipe.encode_prompt(list(texts), None, device=pipe.device, max_sequence_length=length)
    return embeds, pooled


@torch.no_grad()
def encode_pixels(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, h, w) in [-1, 1] as packed, scaled latents (B, N, C): the posterior's mode."""
    from diptych.student.canvas import pack

    latents = pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)).latent_dist.mode()
    return pack((latents - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor)
