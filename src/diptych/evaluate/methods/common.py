"""What every method is, and what methods share: opening the teacher, its noise, drawing with it, training on one panel.

A method answers a batch of samples, each with its reference, its prompts and its seed. All methods get the same seeds,
and a seed means the same noise wherever the canvas is the same.

One panel's flow matching is how the baselines that train continue the teacher's own training. With clean latents x_0,
noise ε and noise level σ: x_t = (1 − σ)·x_0 + σ·ε, and the model answers ε − x_0. Shapes: B batch, N tokens of a panel,
C channels of a token, L text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diptych.student.families import teachers
from diptych.utils import models

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample, Suite
    from diptych.recipe.schema import Recipe
    from diptych.student.canvas import Canvas

log = logging.getLogger(__name__)


class Method(Protocol):
    """What is asked of a method."""

    def fingerprint(self) -> str:
        """What decides its pictures besides suite and seeds: weights. UserError if they are not there."""
        ...

    def prepare(self, references: Sequence[Image], samples: Sequence[Sample]) -> None:
        """What comes before drawing these (a training), and does not count into a picture's seconds."""
        return None

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        """One picture for each sample, of the reference's size."""
        ...


@dataclass
class Context:
    """What methods share. The last opened model is kept, so that neighbours need not open it again."""

    recipe: Recipe
    run_dir: Path
    suite: Suite
    source: Path | None = None  # another run, which may have drawn the same pictures
    _slot: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # On its way to a worker it takes no opened model along.
        return {**self.__dict__, "_slot": {}}

    def opened(self, key: str, open_it: Callable[[], Any]) -> Any:
        """The model `key`, opened now unless it is the one that was opened last."""
        if key not in self._slot:
            self._slot.clear()
            self._slot[key] = open_it()
        return self._slot[key]

    def teacher(self) -> Any:
        """The recipe's teacher as a stock FluxPipeline."""
        return self.opened("teacher", lambda: open_teacher(self.recipe))


class Base:
    """What methods have in common."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.recipe = context.recipe

    def prepare(self, references: Sequence[Image], samples: Sequence[Sample]) -> None:
        """Nothing."""


# ---- drawing with the teacher


def open_teacher(recipe: Recipe, precision: str | None = None) -> Any:
    """The recipe's teacher as a stock FluxPipeline on the recipe's device, in `precision` or else as it paints.
    UserError if it cannot be opened."""
    import torch

    from diptych.student.settings import Settings
    from diptych.utils.machine import pick_device, pick_precision

    folder = models.resolve(recipe.teacher, "teacher")
    keys = ("evaluate.steps", "evaluate.true_guidance")
    steps = recipe.evaluate.steps or Settings().steps
    if found := teachers.advice(recipe.teacher, steps, recipe.evaluate.true_guidance, keys):
        log.warning("%s", found)
    device = pick_device(recipe.device)
    dtype = getattr(torch, pick_precision(precision or recipe.paint.dtype, device)[0])
    return teachers.open_teacher(folder, dtype, "FluxPipeline").to(device)


def draw(
    pipe: Any, prompts: list[str], height: int, width: int, latents: torch.Tensor, recipe: Recipe, **more: Any
) -> list[Any]:
    """The teacher draws, with the recipe's settings for baselines. `latents` is packed noise of the whole image."""
    from diptych.student.settings import Settings

    length = min(512, int(pipe.tokenizer_2.model_max_length))
    drawn = pipe(
        prompt=prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=recipe.evaluate.true_guidance,
        guidance_scale=recipe.paint.guidance,
        num_inference_steps=recipe.evaluate.steps or Settings().steps,
        height=height,
        width=width,
        latents=latents.to(pipe.device, pipe.transformer.dtype),
        max_sequence_length=length,
        **more,
    )
    return list(drawn.images)


def noise(pipe: Any, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Packed float32 noise (B, tokens, 4C), one CPU generator for each image: a batch draws what single calls draw."""
    import torch

    from diptych.student.canvas import pack

    factor = pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels // 4, height // factor, width // factor)
    drawn = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return pack(torch.cat(drawn))


def size_of(references: Sequence[Image]) -> tuple[int, int]:
    """Height and width of a panel: the references'."""
    sizes = {image.size for image in references}
    assert len(sizes) == 1, "the references of a suite have one size"
    width, height = sizes.pop()
    return height, width


# ---- training the teacher on one panel


def canvas(pipe: Any, height: int, width: int) -> Canvas:
    """One panel of this size in pixels, alone."""
    from diptych.student.canvas import Canvas

    return Canvas(height, width, pipe.vae_scale_factor, panels=1)


def frozen_teacher(recipe: Recipe) -> tuple[Any, str]:
    """The recipe's teacher to train on, whole and frozen in what training computes in; and that, by name."""
    from diptych.utils.machine import pick_device, pick_precision

    precision, _ = pick_precision(recipe.distill.precision, pick_device(recipe.device))
    pipe = open_teacher(recipe, precision)
    pipe.transformer.requires_grad_(False)
    return pipe, precision


def shift(pipe: Any, canvas: Canvas, asked: float | str) -> float:
    """`distill.shift` as a number: for `auto`, what the teacher samples one panel with."""
    from diptych.train.schedule import timestep_shift

    return timestep_shift(pipe, canvas) if asked == "auto" else float(asked)


def panel_size(pipe: Any, asked: int | None) -> int:
    """Side of a panel in pixels: `paint.panel_size`, or what the teacher's VAE was made for, 512 at most."""
    return asked or min(512, int(pipe.vae.config.sample_size))


def encode_text(pipe: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, L, D) and pooled embeddings (B, P) of a stock FluxPipeline."""
    import torch

    length = min(512, int(pipe.tokenizer_2.model_max_length))
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(list(texts), None, device=pipe.device, max_sequence_length=length)
    return embeds, pooled


def encode_pixels(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, h, w) in [-1, 1] as packed, scaled latents (B, N, C): the posterior's mode."""
    import torch

    from diptych.student.canvas import pack

    with torch.no_grad():
        latents = pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)).latent_dist.mode()
        return pack((latents - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor)


def encode(pipe: Any, images: Sequence[Image]) -> torch.Tensor:
    """Pictures of one panel as packed, scaled latents (B, tokens, 4C): the posterior's mode."""
    import torch

    from diptych.student.canvas import to_pixels

    return encode_pixels(pipe, torch.stack([to_pixels(image) for image in images]))
