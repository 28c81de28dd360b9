"""The methods that are compared: the students, and their baselines.

A method answers a batch of samples, each with its reference, its prompts and its seed. All methods get the same seeds,
and a seed means the same noise wherever the canvas is the same. Adding a method is adding one class to `METHODS`.

- `text_only`: the teacher draws one panel from the prompt; the reference is never looked at.
- `copy`: the reference itself.
- `inpaint`: the teacher draws a 1×2 grid whose left panel is held to the reference, x_left(t) = (1 − σ)·z + σ·ε, the
  path that rectified flow takes to z anyway ("diptych prompting", training-free). Stock `FluxPipeline` and a callback.
- `student`, `student_shipped`: the run's student, and the one in the package.
- `tuned`, `adapter`, `pipeline`: a LoRA for each subject (tuning.py), an image-embedding adapter (adapter.py), any
  diffusers pipeline with a reference input (pipelines.py).
- `truth`, `other`: no methods but anchors, drawn by the renderer: the asked picture, and the same with another subject.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from diptych.data.places import bring
from diptych.errors import UserError
from diptych.student.families import teachers
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.opening import open_pipeline

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample, Suite
    from diptych.recipe.schema import Evaluate, Recipe

log = logging.getLogger(__name__)
ANCHORS = ("truth", "other")
PARTS = ("transformer", "pytorch_lora_weights.safetensors")  # what is a student's own in its folder


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


class TextOnly(Base):
    """The teacher and the prompt."""

    def fingerprint(self) -> str:
        return models.fingerprint(models.resolve(self.recipe.teacher, "teacher"))

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        pipe = self.context.teacher()
        height, width = size_of(references)
        latents = noise(pipe, seeds, height, width)
        return draw(pipe, [s.prompt for s in samples], height, width, latents, self.recipe)


class Inpaint(TextOnly):
    """The teacher draws a grid; its left panel is held to the reference."""

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        height, width = size_of(references)
        grids = self.grids(references, [s.grid_prompt for s in samples], seeds)
        return [grid.crop((width, 0, 2 * width, height)) for grid in grids]

    def grids(self, references: Sequence[Image], prompts: list[str], seeds: Sequence[int], **more: Any) -> list[Any]:
        """The whole grids: the left panel is the reference as the VAE gives it back. `more` goes to the pipeline."""
        from diptych.student.canvas import Canvas, join_tokens, split_tokens

        pipe = self.context.teacher()
        height, width = size_of(references)
        canvas = Canvas(height, width, pipe.vae_scale_factor)
        z = encode(pipe, references)
        latents = noise(pipe, seeds, height, 2 * width)
        left_noise, _ = split_tokens(latents.to(z.device, z.dtype), canvas)

        def hold(pipeline: Any, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            sigma = pipeline.scheduler.sigmas[step + 1].to(z.device, z.dtype)
            _, right = split_tokens(tensors["latents"], canvas)
            held = (1 - sigma) * z + sigma * left_noise
            return {"latents": join_tokens(held.to(right.dtype), right, canvas)}

        return draw(pipe, prompts, height, 2 * width, latents, self.recipe, callback_on_step_end=hold, **more)


class Copy(Base):
    """The reference, whatever was asked."""

    def fingerprint(self) -> str:
        return "copy"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return list(references)


class Student(Base):
    """The student this run has trained."""

    name: ClassVar[str] = "student"

    def place(self) -> Path:
        folder = bring(self.context.run_dir, "student")
        # The summary is what distill writes last.
        if not any((folder / name).exists() for name in ("training/summary.json", *PARTS)):
            run = self.context.run_dir
            raise UserError(f"{folder} holds no student yet; first: diptych distill {run}/recipe.yaml --out {run}")
        return folder

    def base(self) -> str:
        return self.recipe.teacher

    def fingerprint(self) -> str:
        folder = self.place()
        own = "+".join(models.fingerprint(folder / part) for part in PARTS if (folder / part).exists())
        base, settings = models.resolve(self.base(), "teacher"), self.recipe.evaluate
        if None in (settings.steps, settings.image_guidance, settings.text_guidance, settings.null_panel):
            from diptych.student.weights.sources import read_settings

            own += f" sampled {read_settings(folder, base).values()}"
        return f"{own} on {models.fingerprint(base)}"

    def open(self) -> Any:
        return open_student(self.place(), self.base(), self.recipe)

    def opened(self) -> Any:
        """Its pipeline, which stays open."""
        return self.context.opened(self.name, self.open)

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return self.drawn(references, samples, seeds, {})

    def drawn(
        self,
        references: Sequence[Image],
        samples: Sequence[Sample],
        seeds: Sequence[int],
        otherwise: Mapping[str, Any],
    ) -> Sequence[Image]:
        """Pictures as the recipe evaluates, but for the keys of guidance in `otherwise`; what neither sets is the
        student's own setting."""
        pipe = self.opened()
        height, width = size_of(references)
        settings = self.recipe.evaluate.model_copy(update=dict(otherwise))
        drawn = pipe(
            prompt=[s.prompt for s in samples],
            reference=list(references),
            height=height,
            width=width,
            num_inference_steps=settings.steps,
            guidance_scale=self.recipe.paint.guidance,
            image_guidance_scale=settings.image_guidance,
            text_guidance_scale=settings.text_guidance,
            null_panel=pipe.speed.null_panel or settings.null_panel,
            generator=list(seeds),
        )
        return drawn.images


class StudentShipped(Student):
    """The student in the package, on the package's own teacher."""

    name: ClassVar[str] = "student_shipped"

    def place(self) -> Path:
        return models.resolve("pocket", "student")

    def base(self) -> str:
        return "pocket"


class Truth(Base):
    """The asked picture, drawn by the renderer."""

    def fingerprint(self) -> str:
        return "truth"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return [self.context.suite.truth(sample) for sample in samples]


class Other(Base):
    """The asked picture with another subject of the kind, drawn by the renderer."""

    def fingerprint(self) -> str:
        return "other"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return [self.context.suite.other(sample) for sample in samples]


def _tuned(context: Context) -> dict[str, Method]:
    from diptych.evaluate.methods.tuning import sweep

    return sweep(context)


def _adapter(context: Context) -> Method:
    from diptych.evaluate.methods.adapter import ImageAdapter

    return ImageAdapter(context)


def _pipeline(context: Context) -> Method:
    from diptych.evaluate.methods.pipelines import Stock

    return Stock(context)


METHODS: dict[str, Callable[[Context], Method | dict[str, Method]]] = {
    "text_only": TextOnly,
    "copy": Copy,
    "inpaint": Inpaint,
    "student": Student,
    "student_shipped": StudentShipped,
    "tuned": _tuned,
    "adapter": _adapter,
    "pipeline": _pipeline,
    "truth": Truth,
    "other": Other,
}


def drawn(settings: Evaluate) -> list[str]:
    """The methods that a recipe asks for and, with its yardsticks, the anchors, each once: what draws every sample."""
    return list(dict.fromkeys([*settings.methods, *(ANCHORS if settings.yardsticks else ())]))


def named(name: str, context: Context) -> dict[str, Method]:
    """The methods that a recipe's name stands for: one of that name, or the several of a sweep."""
    made = METHODS[name](context)
    return made if isinstance(made, dict) else {name: made}


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
    pipe = open_pipeline(folder, dtype, kind="FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def open_student(folder: Path, base: str, recipe: Recipe) -> Any:
    """A student's pipeline: a folder with a transformer, or a control-LoRA on its widened base."""
    from diptych import student

    with quiet_bars():
        pipe = student.load(folder, base=base, device=recipe.device, fuse=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def encode(pipe: Any, images: Sequence[Image]) -> torch.Tensor:
    """Pictures of one panel as packed, scaled latents (B, tokens, 4C): the posterior's mode."""
    import torch

    from diptych.evaluate.methods.panel import encode_pixels
    from diptych.student.canvas import to_pixels

    return encode_pixels(pipe, torch.stack([to_pixels(image) for image in images]))


def size_of(references: Sequence[Image]) -> tuple[int, int]:
    """Height and width of a panel: the references'."""
    sizes = {image.size for image in references}
    assert len(sizes) == 1, "the references of a suite have one size"
    width, height = sizes.pop()
    return height, width
