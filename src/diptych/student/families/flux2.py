"""FLUX.2 (klein base 4B and 9B, dev): `Flux2Transformer2DModel`; Qwen 3 (klein) or Mistral (dev) read the prompt.

The VAE's latents are patched 2×2 first and then normalized by the statistics of a batch norm. Position ids have four
axes; reference i has T = 10·(i + 1), as in the stock pipelines. klein has no guidance embedding, dev has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from diptych.student.families.base import (
    Family,
    Reference,
    Size,
    Text,
    beside,
    embedded,
    pack,
    positions,
    repeated,
    unpack,
)

ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "attn.to_qkv_mlp_proj", "attn.to_out",
)  # fmt: skip
MLP = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
FRAME = 10  # T of the first reference, and from one to the next


class Flux2(Family):
    """In single blocks, one linear layer belongs to both attention and MLP, so both sets adapt it."""

    name = "flux2"
    pipelines = ("Flux2KleinPipeline", "Flux2Pipeline")
    editor = "Flux2KleinPipeline"
    transformer = "Flux2Transformer2DModel"
    input_layer = "x_embedder"
    blocks = ("transformer_blocks", "single_transformer_blocks")
    conditionings = ("diptych", "tokens", "channel")
    texts = ("embeds",)
    lora_targets: ClassVar = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)}

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = _statistics(vae)
        return (pack(vae.encode(pixels).latent_dist.mode()) - mean) / std

    def decode(self, vae: Any, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        mean, std = _statistics(vae)
        latents = unpack(tokens * std.to(tokens) + mean.to(tokens), size)
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    def embed(self, pipe: Any, prompts: Sequence[str], length: int) -> Text:
        return Text(pipe.encode_prompt(list(prompts), max_sequence_length=length)[0])

    def shift(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float | None:
        """From the tokens and the steps, by the stock pipeline's empirical fit. The scheduler's config is not read."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

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
        ids = [positions(size, axes=4)]
        ids += [positions(r.size, FRAME * (1 + i), axes=4) for i, r in enumerate(references)]
        length = text.embeds.shape[1]
        words = torch.zeros(length, 4, device=x.device)
        words[:, 3] = torch.arange(length)
        (v,) = transformer(
            hidden_states=beside(hidden, references),
            timestep=sigma,
            guidance=repeated(embedded(transformer, guidance), x),
            encoder_hidden_states=text.embeds,
            txt_ids=words.expand(len(x), -1, -1),
            img_ids=torch.cat(ids).to(x.device).expand(len(x), -1, -1),
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        return v[:, : x.shape[1]]


def _statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each number of a token, (4C,)."""
    return vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
