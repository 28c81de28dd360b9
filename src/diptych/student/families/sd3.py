"""Stable Diffusion 3.5 (medium, large): `SD3Transformer2DModel`; two CLIPs and T5 read the prompt.

The transformer takes latents as an image and patches them itself, with a convolution as its input layer and a cropped
table of positions. Positions are those of one image, so a reference cannot be appended as tokens with this class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from diptych.errors import UsageError
from diptych.student.families.base import Family, Reference, Size, Text, pack, unpack

ATTENTION = tuple(
    f"{attention}.{layer}"
    for attention, layers in {
        "attn": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "attn2": ("to_q", "to_k", "to_v", "to_out.0"),
    }.items()
    for layer in layers
)
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class StableDiffusion3(Family):
    """A token here is a 2×2 patch of latents, as the transformer's input layer reads it."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    editor = None
    transformer = "SD3Transformer2DModel"
    input_layer = "pos_embed.proj"
    blocks = ("transformer_blocks",)
    conditionings = ("diptych", "channel")
    texts = ("embeds", "pooled")
    reader = "tokenizer_3"
    text_tokens = 256
    lora_targets: ClassVar = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)}

    def embed(self, pipe: Any, prompts: Sequence[str], length: int) -> Text:
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return Text(embeds, pooled)

    def shift(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float | None:
        return super().shift({"max_shift": 1.16, **scheduler}, tokens, steps)

    def channels(self, config: Mapping[str, Any]) -> tuple[int, int]:
        into, out = super().channels(config)
        return config["patch_size"] ** 2 * into, out

    def sigmas(self, steps: int) -> None:
        """Those of the scheduler."""

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
        if references:
            raise UsageError(
                "method_unsuited", "Stable Diffusion 3 takes no reference tokens; use conditioning diptych or channel"
            )
        latents = unpack(x, size)
        if condition is not None:
            latents = torch.cat([latents, unpack(condition, size)], dim=1)
        (v,) = transformer(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled,
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        return pack(v)
