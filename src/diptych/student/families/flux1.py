"""FLUX.1 (dev, and models of its architecture): `FluxTransformer2DModel`, CLIP and T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from diptych.student.families.base import Family, Reference, Size, Text, positions, repeated

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")


class Flux1(Family):
    """Position ids are (frame, row, column); reference i has frame 1 + i, as Kontext has it for the first."""

    name = "flux1"
    pipelines = ("FluxPipeline", "FluxControlPipeline")
    editor = "FluxKontextPipeline"
    transformer = "FluxTransformer2DModel"
    input_layer = "x_embedder"
    blocks = ("transformer_blocks", "single_transformer_blocks")
    conditionings = ("diptych", "tokens", "channel")
    lora_targets: ClassVar = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)}

    def embed(self, pipe: Any, prompts: Sequence[str], length: int) -> Text:
        embeds, pooled, _ = pipe.encode_prompt(list(prompts), None, max_sequence_length=length)
        return Text(embeds, pooled)

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
        ids = [positions(size), *(positions(r.size, 1 + i) for i, r in enumerate(references))]
        hidden = x if condition is None else torch.cat([x, condition], dim=2)
        hidden = torch.cat([hidden, *(r.tokens for r in references)], dim=1) if references else hidden
        scale = guidance if transformer.config.guidance_embeds else None
        v = self.forward(transformer, hidden, torch.cat(ids).to(x), sigma, text, scale, attention)
        return v[:, : x.shape[1]]

    def forward(
        self,
        transformer: Any,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        sigma: torch.Tensor,
        text: Text,
        guidance: float | None = None,
        attention: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The transformer's output (B, N, C) for input tokens (B, N, ·) at positions `ids` (N, 3).

        `transformer` may wrap the model (DDP). The other arguments are those of `velocity`. `guidance` must be None for
        a transformer without a guidance embedding.
        """
        (v,) = transformer(
            hidden_states=tokens,
            timestep=sigma,
            guidance=repeated(guidance, tokens),
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embeds,
            txt_ids=ids.new_zeros(text.embeds.shape[1], 3),
            img_ids=ids,
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        return v


FLUX1 = Flux1()
