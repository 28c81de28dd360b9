"""FLUX.1 (dev, and models of its architecture): `FluxTransformer2DModel`, CLIP and T5."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch

from diptych.student.families.base import Family, Reference, Size, Text, beside, embedded, positions, repeated

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")
Layout = tuple[tuple[int, int], ...]  # token rows and columns of each reference


def token_ids(target: tuple[int, int], layout: Layout, style: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of the target (N, 3) and of all its references (R, 3), float32.

    `target` and `layout` are in token rows and columns. `style` is `frame` or `left`. Without references, the target's
    ids equal the teacher's.
    """
    column, parts = 0, [torch.zeros(0, 3)]
    for number, shape in enumerate(layout):
        frame, first = (1 + number, 0) if style == "frame" else (0, column)
        parts.append(positions(Size(*shape), frame, first))
        column += shape[1]
    return positions(Size(*target), columns_from=column if style == "left" else 0), torch.cat(parts)


@lru_cache(maxsize=64)
def _ids(target: Size, layout: Layout, left: bool, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """`token_ids` on a device, computed once for all steps."""
    return [ids.to(device, dtype) for ids in token_ids(target, layout, "left" if left else "frame")]


class Flux1(Family):
    """Position ids are (frame, row, column); reference i has frame 1 + i, as Kontext has it for the first."""

    name = "flux1"
    pipelines = ("FluxPipeline", "FluxControlPipeline")
    editor = "FluxKontextPipeline"
    transformer = "FluxTransformer2DModel"
    input_layer = "x_embedder"
    blocks = ("transformer_blocks", "single_transformer_blocks")
    conditionings = ("diptych", "tokens", "channel")
    texts = ("embeds", "pooled")
    reader = "tokenizer_2"
    lora_targets: ClassVar = {"attention": ATTENTION, "attention+mlp": (*ATTENTION, *MLP)}

    def check(self, conditioning: str, positions: str = "frame", attention: str = "joint") -> None:
        """Every combination works."""

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
        layout, left = tuple(r.size for r in references), any(r.left for r in references)
        ids, of_references = _ids(size, layout, left, x.device, x.dtype)
        hidden = x if condition is None else torch.cat([x, condition], dim=2)
        hidden = beside(hidden, references)
        ids = torch.cat([ids, of_references]) if hidden.shape[1] > len(ids) else ids
        v = self.forward(transformer, hidden, ids, sigma, text, embedded(transformer, guidance), attention)
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
