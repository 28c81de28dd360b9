"""What differs between teachers, behind one interface: a family for each kind of transformer.

The sampler and the loss see tokens (B, N, C), noise levels σ in [0, 1] and a velocity that is always noise − clean.
The family translates these for its transformer and its VAE. Shapes: B batch, N tokens of an image, C
numbers of a token, L text tokens, D and P widths of the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from diptych.errors import UsageError

Scheduler = Any  # a diffusers scheduler
Module = Any  # a diffusers transformer or VAE; they ship partial types


class Size(NamedTuple):
    """Height and width of an image in tokens."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


Texts = tuple[torch.Tensor, ...]
"""The tensors of a `Text` that a family has, one row for each prompt. Batches and caches handle these."""


@dataclass(frozen=True)
class Text:
    """Encoded prompts.

    Attributes:
        embeds: (B, L, D) hidden states.
        pooled: (B, P), or None for families without pooled text.
        mask: (B, L) bool, false on padding; None if every position counts.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def tensors(self) -> Texts:
        """Those that are not None, in the order of `Family.texts`."""
        return tuple(tensor for tensor in (self.embeds, self.pooled, self.mask) if tensor is not None)


@dataclass(frozen=True)
class Reference:
    """A clean reference image as tokens.

    Attributes:
        tokens: (B, M, C) of one image for each row of the batch, all of one size. None if the attention processors get
            its keys and values instead.
        size: its height and width in tokens.
        left: whether its position is to the left of the target in one wide image, not in a separate frame (FLUX.1).
    """

    tokens: torch.Tensor | None
    size: Size
    left: bool = False


class Family(ABC):
    """One kind of transformer with its VAE and text encoders. Subclasses are stateless."""

    name: ClassVar[str]
    """Its name in recipes and tables."""
    pipelines: ClassVar[tuple[str, ...]]
    """Stock text-to-image pipeline classes."""
    editor: ClassVar[str | None]
    """The stock pipeline class that runs a student of the conditioning `tokens`; None if there is none."""
    transformer: ClassVar[str]
    """Class of the transformer."""
    input_layer: ClassVar[str]
    """Path of the layer that reads image tokens."""
    blocks: ClassVar[tuple[str, ...]]
    """Paths of the lists of repeated blocks."""
    conditionings: ClassVar[tuple[str, ...]]
    """How a reference can enter this family's stock class."""
    reader: ClassVar[str] = "tokenizer"
    """The pipeline's tokenizer that limits the length of a prompt."""
    text_tokens: ClassVar[int] = 512
    """Maximum length of a prompt."""
    texts: ClassVar[tuple[str, ...]]
    """The fields of `Text` that its text encoders give: `embeds`, `pooled`, `mask`."""
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]]
    """Named sets of linear layers for `distill.lora_targets`, as ends of layer paths."""

    def block_lists(self, transformer: Module) -> list[Module]:
        """All repeated blocks of a transformer, in the order of `blocks`."""
        return [block for path in self.blocks for block in transformer.get_submodule(path)]

    # The VAE ----------------------------------------------------------------------------------------------------------

    # By default that of an `AutoencoderKL`, whose latents are shifted and scaled.

    def unit(self, vae: Module) -> int:
        """Pixels of a token's side: sizes of images are multiples of it."""
        return 2 * 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, vae: Module, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to normalized tokens (B, N, C): the posterior's mode."""
        latents = vae.encode(pixels).latent_dist.mode()
        return pack((latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)

    def decode(self, vae: Module, tokens: torch.Tensor, size: Size) -> torch.Tensor:
        """The inverse of `encode`: tokens (B, N, C) to pixels (B, 3, H, W)."""
        latents = unpack(tokens, size) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    def size(self, vae: Module, height: int, width: int) -> Size:
        """The size in tokens of an image in pixels. UsageError unless both sides are multiples of `unit`."""
        unit = self.unit(vae)
        if height <= 0 or width <= 0 or height % unit or width % unit:
            raise UsageError("size_invalid", f"{height}×{width} pixels: both sides must be multiples of {unit}")
        return Size(height // unit, width // unit)

    # Text -------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, pipe: Any, prompts: Sequence[str], length: int) -> Text:
        """Prompts, encoded by the pipeline's text encoders, with at most `length` tokens."""

    def text(self, tensors: Texts) -> Text:
        """The inverse of `Text.tensors`."""
        return Text(**dict(zip(self.texts, tensors, strict=True)))

    # Time -------------------------------------------------------------------------------------------------------------

    def shift(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float | None:
        """μ, by whose exponential timesteps are shifted; None for one fixed shift.

        `scheduler` is the scheduler's config. The default is linear in the tokens, with FLUX.1's constants where the
        config has none.
        """
        from diffusers.pipelines.flux.pipeline_flux_control import calculate_shift

        if not scheduler.get("use_dynamic_shifting"):
            return None
        known = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return calculate_shift(tokens, *(scheduler.get(key, value) for key, value in known.items()))

    def sigmas(self, steps: int) -> Any:
        """Noise levels before the shift, (steps,); None for those of the scheduler."""
        return np.linspace(1.0, 1 / steps, steps)

    def schedule(
        self,
        scheduler: Scheduler,
        tokens: int,
        steps: int,
        device: torch.device,
        sigmas: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Sets the scheduler's noise levels, as the stock pipeline does; timesteps (S,) from 1000 down to 0."""
        mu = self.shift(scheduler.config, tokens, steps)
        given = self.sigmas(steps) if sigmas is None else sigmas
        options: dict[str, Any] = {"num_inference_steps": steps} if given is None else {"sigmas": given}
        scheduler.set_timesteps(device=device, **options, **({} if mu is None else {"mu": mu}))
        scheduler.set_begin_index(0)
        return scheduler.timesteps

    # The transformer --------------------------------------------------------------------------------------------------

    @abstractmethod
    def velocity(
        self,
        transformer: Module,
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
        """The velocity noise − clean at x, (B, N, C), from one forward pass.

        Args:
            x: (B, N, C) noisy tokens of an image of `size`.
            sigma: (B,) noise levels in [0, 1].
            references: clean references, appended with separate positions (conditioning `tokens`).
            condition: (B, N, C), joined to x channel by channel (`diptych` and `channel`); needs a widened input.
            guidance: distilled guidance; read only by a transformer with a guidance embedding.
            attention: passed to the attention processors.
        """

    def check(self, conditioning: str, positions: str = "frame", attention: str = "joint") -> None:
        """UsageError for a way in which a reference cannot enter (`distill.conditioning`, `positions` and
        `reference_attention`)."""
        if conditioning not in self.conditionings:
            raise UsageError(
                "method_unsuited",
                f"{self.transformer} has no conditioning {conditioning}. Set distill.conditioning to "
                f"{' or '.join(self.conditionings)}.",
            )
        for key, value, only in (("positions", positions, "frame"), ("reference_attention", attention, "joint")):
            if value != only:
                raise UsageError(
                    "method_unsuited",
                    f"distill.{key}: {value} is for FLUX.1, not for {self.transformer}. Set it to {only}.",
                )

    def channels(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Numbers of an input token and of an output token of a transformer with this config."""
        out = config.get("out_channels") or config["in_channels"]
        return config["in_channels"], config.get("patch_size", 1) ** 2 * out

    def widened(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The transformer's config with twice the input channels; None if the stock class fixes out = in."""
        plain = {key: value for key, value in config.items() if not key.startswith("_")}  # diffusers drops `_`'s values
        channels = config["in_channels"]
        return {**plain, "in_channels": 2 * channels, "out_channels": config.get("out_channels") or channels}


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, 2R, 2K) to tokens (B, R·K, 4C): 2×2 patches row by row, channels first within a token."""
    b, c, h, w = latents.shape
    tokens = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, size: Size) -> torch.Tensor:
    """Tokens (B, R·K, 4C) to latents (B, C, 2R, 2K); the inverse of `pack`."""
    b, _, c = tokens.shape
    latents = tokens.reshape(b, *size, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, c // 4, 2 * size.rows, 2 * size.columns)


def positions(size: Size, frame: int = 0, columns_from: int = 0, axes: int = 3) -> torch.Tensor:
    """Position ids (N, axes) of an image's tokens: (frame, row, column), and zeros in further axes; float32."""
    rows, columns = torch.meshgrid(torch.arange(size.rows), torch.arange(size.columns), indexing="ij")
    ids = torch.zeros(size.tokens, axes)
    ids[:, 0], ids[:, 1], ids[:, 2] = frame, rows.flatten(), columns.flatten() + columns_from
    return ids


def join(texts: Sequence[Texts]) -> Texts:
    """The rows of several texts. Those with a mask are padded to the longest."""
    length = max(embeds.shape[1] for embeds, *_ in texts)
    return tuple(torch.cat(parts) for parts in zip(*(_padded(text, length) for text in texts), strict=True))


def has_mask(text: Texts) -> bool:
    """Whether a text has a mask, so that rows may have different lengths."""
    return text[-1].dtype == torch.bool


def _padded(text: Texts, length: int) -> Texts:
    missing = length - text[0].shape[1]
    if not missing or not has_mask(text):
        return text
    embeds, *pooled, mask = text
    pad = torch.nn.functional.pad
    return (pad(embeds, (0, 0, 0, missing)), *pooled, pad(mask, (0, missing)))


def beside(tokens: torch.Tensor, references: Sequence[Reference]) -> torch.Tensor:
    """Input tokens (B, N, ·), and after them those of the references that have any."""
    clean = [reference.tokens for reference in references if reference.tokens is not None]
    return torch.cat([tokens, *clean], dim=1) if clean else tokens


def embedded(transformer: Module, guidance: float | None) -> float | None:
    """The distilled guidance for a transformer, which may be wrapped (DDP). None if it has no guidance embedding."""
    if guidance is None:
        return None
    return guidance if getattr(transformer, "module", transformer).config.get("guidance_embeds") else None


def repeated(value: float | None, like: torch.Tensor) -> torch.Tensor | None:
    """A distilled guidance scale for each row, float32."""
    return None if value is None else torch.full([len(like)], value, device=like.device, dtype=torch.float32)
