"""The two-panel flow-matching loss, the core of Diffusion Self-Distillation (paper section 3.2).

Both panels of the canvas are noised, and both have a loss. On the left the model sees its reference and learns the
identity mapping; on the right it learns the edit. With clean latents x_0, noise ε and noise level σ:

    x_t = (1 − σ)·x_0 + σ·ε        v = model([x_t ; c], σ, text)        loss = ‖v − (ε − x_0)‖²

c is the VAE encoding of [reference | black], joined to x_t channel by channel, token by token. With
`distill.conditioning: channel` the canvas is only the target panel and c the encoding of the reference: stock
FLUX-Control, the paper's baseline. With `tokens` the canvas is only the target panel too, the reference's clean tokens
follow the target's in the sequence, and only the target's have a loss. Shapes: B batch, N canvas tokens, R reference
tokens, C channels of a token, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from diptych.student.attention import capture
from diptych.student.canvas import Canvas, split_tokens
from diptych.student.families.base import Text, positions
from diptych.student.families.flux1 import FLUX1
from diptych.student.references import TokenStyle, token_ids

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill

Transformer = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Batch:
    """The tensors of one step. Each part moves to the model's device when it is computed."""

    clean: torch.Tensor  # (B, N, C) x_0, packed latents of [reference | target]
    # (B, N, C) c, packed latents of [reference | black], all zero for the null reference; or (B, R, C) reference tokens
    condition: torch.Tensor
    noise: torch.Tensor  # (B, N, C) ε
    sigma: torch.Tensor  # (B,) in [0, 1]
    prompt_embeds: torch.Tensor  # (B, L, D) T5's
    pooled: torch.Tensor  # (B, P) CLIP's
    negative: torch.Tensor | None = None  # (B, N, C) packed latents of [reference | negative] (preference.py)
    bare: torch.Tensor | None = None  # (B,) bool: samples without reference tokens; None: no such samples
    canvas: Canvas = field(kw_only=True)  # of all samples

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not None, by name."""
        return {name: tensor for name, tensor in vars(self).items() if torch.is_tensor(tensor)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        return Batch(**{name: change(tensor) for name, tensor in self.tensors.items()}, canvas=self.canvas)

    def select(self, rows: list[int]) -> Batch:
        """Some of the samples, in this order. The batch itself if `rows` are all samples."""
        if rows == list(range(len(self.sigma))):
            return self
        index = torch.tensor(rows, device=self.sigma.device)
        return self.map(lambda tensor: tensor.index_select(0, index))

    def split(self, size: int) -> list[Batch]:
        """The same samples in batches of at most `size`, in order."""
        parts = {name: tensor.split(size) for name, tensor in self.tensors.items()}
        rows = zip(*parts.values(), strict=True)
        return [Batch(**dict(zip(parts, tensors, strict=True)), canvas=self.canvas) for tensors in rows]


def panel_losses(
    transformer: Transformer,
    batch: Batch,
    img_ids: torch.Tensor,
    guidance: float | None = None,
    tokens: TokenStyle | None = None,
    together: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared velocity error of each sample on the left and on the right panel, (B,) each, float32. The left one
    is 0 if the canvas has no left panel.

    Args:
        img_ids: (N, 3), FLUX's plain position ids of the whole canvas.
        tokens: options of reference tokens. None for a condition canvas.
        together: see `token_losses`.
    """
    if tokens is not None:
        right = token_losses(transformer, batch, tokens, guidance, together)
        return torch.zeros_like(right), right
    text = batch.prompt_embeds, batch.pooled
    error = velocity_error(
        transformer, batch.clean, batch.noise, batch.sigma, text, img_ids, guidance, condition=batch.condition
    )
    left, right = (side.mean(dim=(1, 2)) for side in split_tokens(error, batch.canvas))
    return left if batch.canvas.panels == 2 else torch.zeros_like(right), right


def token_style(options: Distill) -> TokenStyle | None:
    """The options of a recipe's reference tokens. None for a condition canvas."""
    return TokenStyle(options.positions, options.reference_attention) if options.conditioning == "tokens" else None


def token_losses(
    transformer: Transformer, batch: Batch, style: TokenStyle, guidance: float | None = None, together: bool = False
) -> torch.Tensor:
    """Mean squared velocity error of each sample on the target's tokens, (B,) float32.

    Samples with and without a reference need two passes, because a dropped reference has no tokens. With `together`
    both passes always run, because every process must call sharded weights.
    """
    shape = batch.canvas.rows, batch.canvas.columns
    layout = (shape,) * (batch.condition.shape[1] // batch.canvas.tokens)
    bare = [False] * len(batch.sigma) if batch.bare is None else batch.bare.tolist()
    losses: dict[int, torch.Tensor] = {}
    spare = batch.clean.new_zeros(())  # 0, from passes that run only for other processes
    for without in (False, True):
        rows = [row for row, is_bare in enumerate(bare) if is_bare == without]
        if not rows and not together:
            continue
        part = batch.select(rows or [0])
        target_ids, ids = (
            x.to(part.clean.device) for x in token_ids(shape, () if without else layout, style.positions)
        )
        references = None if without else part.condition
        attention = None
        if references is not None and style.attention == "self":
            attention, references = {"references": capture(transformer, references, ids)}, None
        error = velocity_error(
            transformer,
            part.clean,
            part.noise,
            part.sigma,
            (part.prompt_embeds, part.pooled),
            target_ids if references is None else torch.cat([target_ids, ids]),
            guidance,
            references=references,
            attention=attention,
        ).mean(dim=(1, 2))
        losses |= dict(zip(rows, error, strict=False))
        spare = spare if rows else spare + 0 * error.sum()
    return torch.stack([losses[row] for row in range(len(bare))]) + spare


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
    references: torch.Tensor | None = None,
    attention: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Squared error of each value of the velocity, (B, N, C) float32: flow matching, with or without a reference.

    `clean`, `noise` and `condition` are (B, N, C), `sigma` (B,), `text` (B, L, D) and (B, P). `references` (B, R, C)
    are clean tokens after them, without a loss; `img_ids` is then (N + R, 3), otherwise (N, 3). `guidance` is for
    guidance-distilled transformers, None for others. `attention` are the arguments of the attention processors.
    """
    level = sigma[:, None, None]
    x_t = (1 - level) * clean + level * noise
    inputs = x_t if condition is None else torch.cat([x_t, condition], dim=-1)
    inputs = inputs if references is None else torch.cat([inputs, references], dim=1)
    velocity = FLUX1.forward(transformer, inputs, img_ids, sigma, Text(*text), guidance, attention)
    return (velocity[:, : clean.shape[1]].float() - (noise - clean)).square()


def image_ids(canvas: Canvas) -> torch.Tensor:
    """FLUX's position ids of the whole canvas, (N, 3): 0, token row, token column (float32)."""
    return positions(canvas.size)


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """SD3's timestep shift: s·σ / (1 + (s − 1)·σ). Above 1, training sees more noise; 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)
