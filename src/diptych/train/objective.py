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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from diptych.student.attention import capture
from diptych.student.canvas import Canvas, split_tokens
from diptych.student.families.base import Family, Reference, Text
from diptych.student.families.flux1 import FLUX1, token_ids
from diptych.student.references import TokenStyle

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
    prompt_embeds: torch.Tensor  # (B, L, D), of FLUX.1's T5
    pooled: torch.Tensor | None = None  # (B, P), of FLUX.1's CLIP
    negative: torch.Tensor | None = None  # (B, N, C) packed latents of [reference | negative] (preference.py)
    bare: torch.Tensor | None = None  # (B,) bool: samples without reference tokens; None: no such samples
    mask: torch.Tensor | None = None  # (B, L) bool, false on padding of the text
    canvas: Canvas = field(kw_only=True)  # of all samples

    @property
    def text(self) -> Text:
        return Text(self.prompt_embeds, self.pooled, self.mask)

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
    guidance: float | None = None,
    tokens: TokenStyle | None = None,
    together: bool = False,
    family: Family = FLUX1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared velocity error of each sample on the left and on the right panel, (B,) each, float32. The left one
    is 0 if the canvas has no left panel.

    Args:
        tokens: options of reference tokens. None for a condition canvas.
        together: see `token_losses`.
    """
    if tokens is not None:
        right = token_losses(transformer, batch, tokens, guidance, together, family)
        return torch.zeros_like(right), right
    error = velocity_error(transformer, batch, guidance, family=family, condition=batch.condition)
    left, right = (side.mean(dim=(1, 2)) for side in split_tokens(error, batch.canvas))
    return left if batch.canvas.panels == 2 else torch.zeros_like(right), right


def token_style(options: Distill) -> TokenStyle | None:
    """The options of a recipe's reference tokens. None for a condition canvas."""
    return TokenStyle(options.positions, options.reference_attention) if options.conditioning == "tokens" else None


def token_losses(
    transformer: Transformer,
    batch: Batch,
    style: TokenStyle,
    guidance: float | None = None,
    together: bool = False,
    family: Family = FLUX1,
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
        given: dict[str, Any] = {"references": () if without else style.of(part.condition, layout)}
        if not without and style.attention == "self":
            _, ids = token_ids(shape, layout, style.positions)
            keys = capture(transformer, part.condition, ids.to(part.clean.device))
            given = {"references": style.of(None, layout), "attention": {"references": keys}}
        error = velocity_error(transformer, part, guidance, family=family, **given).mean(dim=(1, 2))
        losses |= dict(zip(rows, error, strict=False))
        spare = spare if rows else spare + 0 * error.sum()
    return torch.stack([losses[row] for row in range(len(bare))]) + spare


def velocity_error(
    transformer: Transformer,
    batch: Batch,
    guidance: float | None = None,
    *,
    family: Family = FLUX1,
    condition: torch.Tensor | None = None,
    references: Sequence[Reference] = (),
    attention: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Squared error of each value of the velocity, (B, N, C) float32: flow matching, with or without a reference.

    `condition` (B, N, C) is joined to the noisy tokens, and `references` follow them, without a loss. `guidance` is for
    guidance-distilled transformers, None for others. `attention` are the arguments of the attention processors.
    """
    level, size = batch.sigma[:, None, None], batch.canvas.size
    x_t = (1 - level) * batch.clean + level * batch.noise
    given: dict[str, Any] = {"references": references, "condition": condition, "attention": attention}
    v = family.velocity(transformer, x_t, batch.sigma, batch.text, size, guidance=guidance, **given)
    return (v.float() - (batch.noise - batch.clean)).square()


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """SD3's timestep shift: s·σ / (1 + (s − 1)·σ). Above 1, training sees more noise; 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)
