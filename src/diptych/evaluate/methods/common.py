"""The protocol of a method, and what methods share: the teacher, its noise, generation with it, training on one panel.

A method generates a batch of samples, each with its reference, prompts and seed. All methods get the same seeds, and
a seed gives the same noise on every canvas of one size.

The baselines that train continue the teacher's training with flow matching on one panel. With clean latents x_0, noise
ε and noise level σ: x_t = (1 − σ)·x_0 + σ·ε, and the model predicts ε − x_0. Shapes: B batch, N tokens of a panel, C
channels of a token, L text tokens.
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
    """A way to generate an image from a reference and a prompt."""

    def fingerprint(self) -> str:
        """What decides the images besides suite and seeds: the weights. UserError if they are missing."""
        ...

    def prepare(self, references: Sequence[Image], samples: Sequence[Sample]) -> None:
        """Work before generation, such as training. It does not count into the seconds of an image."""
        return None

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        """One image for each sample, of the reference's size."""
        ...


@dataclass
class Context:
    """What methods share. The last model stays open, so that the next method can use it again."""

    recipe: Recipe
    run_dir: Path
    suite: Suite
    source: Path | None = None  # another run, which may have generated the same images
    _slot: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # Workers open models themselves.
        return {**self.__dict__, "_slot": {}}

    def opened(self, key: str, open_model: Callable[[], Any]) -> Any:
        """The model `key`, opened now unless it was opened last."""
        if key not in self._slot:
            self._slot.clear()
            self._slot[key] = open_model()
        return self._slot[key]

    def teacher(self) -> Any:
        """The recipe's teacher as a stock FluxPipeline."""
        return self.opened("teacher", lambda: teacher_of(self.recipe))


class Base:
    """Base class of methods with settings in the recipe."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.recipe = context.recipe

    def prepare(self, references: Sequence[Image], samples: Sequence[Sample]) -> None:
        """Nothing."""


# ---- generation with the teacher


def teacher_of(recipe: Recipe, precision: str | None = None) -> Any:
    """The recipe's teacher as a stock pipeline (of FLUX.1, a FluxPipeline) on the recipe's device, in `precision` or
    in `paint.dtype`.

    UserError if it cannot be opened.
    """
    import torch

    from diptych.student.families import is_flux1
    from diptych.student.settings import Settings
    from diptych.utils.machine import pick_device, pick_precision

    keys = ("evaluate.steps", "evaluate.true_guidance")
    steps = recipe.evaluate.steps or Settings().steps
    if advice := teachers.advice(recipe.teacher, steps, recipe.evaluate.true_guidance, keys):
        log.warning("%s", advice)
    device = pick_device(recipe.device)
    dtype = getattr(torch, pick_precision(precision or recipe.paint.dtype, device)[0])
    folder = models.resolve(recipe.teacher, "teacher")
    return teachers.open_teacher(folder, dtype, "FluxPipeline" if is_flux1(folder) else None, device)


def sample_teacher(
    pipe: Any, prompts: list[str], height: int, width: int, latents: torch.Tensor, recipe: Recipe, **more: Any
) -> list[Any]:
    """Images of the teacher with the recipe's settings for baselines. `latents` is packed noise of the whole image."""
    from diptych.student.settings import Settings

    output = pipe(
        prompt=prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=recipe.evaluate.true_guidance,
        guidance_scale=recipe.paint.guidance,
        num_inference_steps=recipe.evaluate.steps or Settings().steps,
        height=height,
        width=width,
        latents=latents.to(pipe.device, pipe.transformer.dtype),
        max_sequence_length=text_length(pipe),
        **more,
    )
    return list(output.images)


def text_length(pipe: Any) -> int:
    """Tokens of a prompt at most: the length of the T5 tokenizer, up to 512."""
    return min(512, int(pipe.tokenizer_2.model_max_length))


def noise(pipe: Any, seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Packed float32 noise (B, tokens, 4C). Each image has a CPU generator, so a batch equals single calls."""
    import torch

    from diptych.student.families.base import pack

    factor = pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels // 4, height // factor, width // factor)
    each = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return pack(torch.cat(each))


def size_of(references: Sequence[Image]) -> tuple[int, int]:
    """Height and width of the references, which all have one size."""
    sizes = {image.size for image in references}
    assert len(sizes) == 1, "the references of a suite have one size"
    width, height = sizes.pop()
    return height, width


# ---- training the teacher on one panel


def canvas(pipe: Any, height: int, width: int) -> Canvas:
    """A canvas of one panel; sizes in pixels."""
    from diptych.student.canvas import Canvas

    return Canvas(height, width, pipe.vae_scale_factor, panels=1)


def frozen_teacher(recipe: Recipe) -> tuple[Any, str]:
    """The recipe's teacher with frozen weights in the precision of training; and that precision by name."""
    from diptych.utils.machine import pick_device, pick_precision

    precision, _ = pick_precision(recipe.distill.precision, pick_device(recipe.device))
    pipe = teacher_of(recipe, precision)
    pipe.transformer.requires_grad_(False)
    return pipe, precision


def shift(pipe: Any, canvas: Canvas, setting: float | str) -> float:
    """`distill.shift` as a number; for `auto`, the shift with which the teacher samples one panel."""
    from diptych.student.settings import Settings
    from diptych.train.schedule import timestep_shift

    return timestep_shift(pipe, canvas, Settings().steps) if setting == "auto" else float(setting)


def encode_text(pipe: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, L, D) and pooled embeddings (B, P) of a stock FluxPipeline."""
    import torch

    with torch.no_grad():
        length = text_length(pipe)
        embeds, pooled, _ = pipe.encode_prompt(list(texts), None, device=pipe.device, max_sequence_length=length)
    return embeds, pooled


def encode_pixels(pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, h, w) in [-1, 1] as packed, scaled latents (B, N, C): the posterior's mode."""
    import torch

    from diptych.student.families.flux1 import Flux1

    with torch.no_grad():
        return Flux1().encode(pipe.vae, pixels.to(pipe.device, pipe.vae.dtype))


def encode(pipe: Any, images: Sequence[Image]) -> torch.Tensor:
    """Images of one panel as packed, scaled latents (B, N, C): the posterior's mode."""
    import torch

    from diptych.student.canvas import to_pixels

    return encode_pixels(pipe, torch.stack([to_pixels(image) for image in images]))
