"""Qwen-Image: `QwenImageTransformer2DModel`; Qwen 2.5 VL reads the prompt, with a mask for texts of other lengths.

The VAE is a video VAE of single frames. Positions come from the sizes of the images alone: the rotary embedding is
centered, and the frame index tells references apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from diptych.student.families.base import Family, Reference, Size, Text, beside, embedded, pack, repeated, unpack

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImage(Family):
    """Stock Qwen-Image-Edit pipelines also show the reference to the text encoder, which a student was not trained
    with; its tokens enter as theirs do."""

    name = "qwen_image"
    pipelines = ("QwenImagePipeline",)
    editor = None
    transformer = "QwenImageTransformer2DModel"
    input_layer = "img_in"
    blocks = ("transformer_blocks",)
    conditionings = ("diptych", "tokens", "channel")
    texts = ("embeds", "mask")
    lora_targets: ClassVar = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)}

    def unit(self, vae: Any) -> int:
        return 2 * 2 ** len(vae.config.temperal_downsample)

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = _statistics(vae, pixels)
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        return pack((latents - mean) / std)

    def decode(self, vae: Any, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        mean, std = _statistics(vae, tokens)
        latents = unpack(tokens, size) * std + mean
        return vae.decode(latents.to(vae.dtype)[:, :, None], return_dict=False)[0][:, :, 0]

    def embed(self, pipe: Any, prompts: Sequence[str], length: int) -> Text:
        embeds, mask = pipe.encode_prompt(list(prompts), max_sequence_length=length)
        return Text(embeds, mask=embeds.new_ones(embeds.shape[:2]).bool() if mask is None else mask.bool())

    def shift(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float | None:
        return super().shift({**scheduler, "use_dynamic_shifting": True}, tokens, steps)

    def velocity(
        self,
        transformer: Any,
        x: torch.Tensor,
        sigma: torch.Tensor,
        text: Text,
        size: Size,
        *,
        references: Sequence[Reference] = (),
        condition: torch.Tensor | None = None,
        guidance: float | None = None,
        attention: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        hidden = x if condition is None else torch.cat([x, condition], dim=2)
        shapes = [(1, *size), *((1, *r.size) for r in references)]
        mask = None if text.mask is None or text.mask.all() else text.mask  # without a mask, attention is faster
        (v,) = transformer(
            hidden_states=beside(hidden, references),
            timestep=sigma,
            guidance=repeated(embedded(transformer, guidance), x),
            encoder_hidden_states=text.embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * len(x),
            attention_kwargs=attention or {},
            return_dict=False,
        )
        return v[:, : x.shape[1]]


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel, (1, C, 1, 1)."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(like) for value in values)
    return mean, std
