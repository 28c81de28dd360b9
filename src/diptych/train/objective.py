"""The two-panel flow-matching loss: the heart of Diffusion Self-Distillation (paper section 3.2).

Both panels of the canvas are noised and both are learnt. On the left the model sees its reference and learns the
identity mapping; on the right it learns the edit. With clean latents x_0, noise ε and noise level σ:

    x_t = (1 − σ)·x_0 + σ·ε        v = model([x_t ; c], σ, text)        loss = ‖v − (ε − x_0)‖²

c is the VAE encoding of [reference | black], joined to x_t channel by channel, token by token. With
`distill.conditioning: channel` the canvas is the target panel alone and c the encoding of the reference: stock
FLUX-Control, which the paper compares with. Shapes: B batch, N
canvas tokens, C channels of a token, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from diptych.student.canvas import Canvas, split_tokens

Transformer = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Batch:
    """One step's tensors; a part of them comes to the model's device when it is computed."""

    clean: torch.Tensor  # (B, N, C) x_0, packed latents of [reference | target]
    condition: torch.Tensor  # (B, N, C) c, packed latents of [reference | black]; all zero is the null reference
    noise: torch.Tensor  # (B, N, C) ε
    sigma: torch.Tensor  # (B,) in [0, 1]
    prompt_embeds: torch.Tensor  # (B, L, D) T5's
    pooled: torch.Tensor  # (B, P) CLIP's
    negative: torch.Tensor | None = None  # (B, N, C) packed latents of [reference | negative] (preference.py)
    canvas: Canvas = field(kw_only=True)  # of all samples

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if torch.is_tensor(tensor)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        return Batch(**{name: change(tensor) for name, tensor in self.tensors.items()}, canvas=self.canvas)

    def split(self, size: int) -> list[Batch]:
        """The same samples in batches of at most `size`, in order."""
        parts = {name: tensor.split(size) for name, tensor in self.tensors.items()}
        rows = zip(*parts.values(), strict=True)
        return [Batch(**dict(zip(parts, tensors, strict=True)), canvas=self.canvas) for tensors in rows]


def panel_losses(
    transformer: Transformer, batch: Batch, img_ids: torch.Tensor, guidance: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared velocity error of each sample on the left and on the right panel, (B,) each, float32; on the left 0
    where the canvas has no left panel. `img_ids` (N, 3) are FLUX's plain position ids of the whole canvas."""
    text = batch.prompt_embeds, batch.pooled
    error = velocity_error(
        transformer, batch.clean, batch.noise, batch.sigma, text, img_ids, guidance, condition=batch.condition
    )
    left, right = (side.mean(dim=(1, 2)) for side in split_tokens(error, batch.canvas))
    return left if batch.canvas.panels == 2 else torch.zeros_like(right), right


def velocity_error(
    transformer: Transformer,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    img_ids: torch.Tensor,
    guidance: float | None = None,
    *,
    condition: torch.Tensor | None = None,
    attention: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Squared error of each number of the velocity, (B, N, C) float32: flow matching, with or without a reference.

    `clean`, `noise` and `condition` are (B, N, C), `sigma` (B,), `text` (B, L, D) and (B, P). `guidance` is passed to
    guidance-distilled transformers, None to others; `attention` goes to the attention processors.
    """
    level = sigma[:, None, None]
    x_t = (1 - level) * clean + level * noise
    embeds, pooled = text
    (velocity,) = transformer(
        hidden_states=x_t if condition is None else torch.cat([x_t, condition], dim=-1),
        timestep=sigma,
        guidance=None if guidance is None else torch.full_like(sigma, guidance),
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=img_ids.new_zeros(embeds.shape[1], 3),
        img_ids=img_ids,
        joint_attention_kwargs=attention,
        return_dict=False,
    )
    return (velocity.float() - (noise - clean)).square()


def image_ids(canvas: Canvas) -> torch.Tensor:
    """FLUX's position ids of the whole canvas, (N, 3): 0, token row, token column (float32)."""
    rows, columns = torch.meshgrid(torch.arange(canvas.rows), torch.arange(canvas.columns), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """SD3's timestep shift: s·σ / (1 + (s − 1)·σ). Above 1, training sees more noise; 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)
