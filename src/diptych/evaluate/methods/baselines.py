"""The baselines that train nothing, and the anchors.

- `text_only`: the teacher draws one panel from the prompt; the reference is never looked at.
- `copy`: the reference itself.
- `inpaint`: the teacher draws a 1×2 grid whose left panel is held to the reference, x_left(t) = (1 − σ)·z + σ·ε, the
  path that rectified flow takes to z anyway ("diptych prompting", training-free). Stock `FluxPipeline` and a callback.
- `pipeline`: any diffusers pipeline with a reference input: Kontext, FLUX.2, Qwen-Image-Edit, …. What a sample asks
  (reference, prompt, seed, size, steps) goes to the arguments that the pipeline's own call has, read off its signature.
  What no signature tells (guidance, negative prompts) is the recipe's `evaluate.pipeline.options`, under the names of
  that pipeline.
- `truth`, `other`: no methods but anchors, drawn by the renderer: the asked picture, and the same with another subject.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, nearest
from diptych.evaluate.methods.common import Base, draw, encode, noise, size_of
from diptych.student.families import teachers
from diptych.utils import models
from diptych.utils.io import sha256_json
from diptych.utils.opening import open_pipeline

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample
    from diptych.recipe.schema import Recipe

# What pipelines call a reference, the surest name first. An IP-Adapter's image counts where an adapter is loaded.
NAMES = ("reference_image", "reference_images", "image_reference", "input_images", "control_image", "image")
LISTS = ("reference_images", "input_images")
ADAPTED = "ip_adapter_image"
# Their `image` is what they start from or fill in, and no reference.
NOT_REFERENCES = ("strength", "mask_image")
# Sizes that a pipeline would choose by itself are the sample's.
SIZES = {"_auto_resize": lambda height, width: False, "max_area": lambda height, width: height * width}
GIVEN = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")  # by the sample and the recipe


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


# ---- any pipeline


class Stock(Base):
    """A stock pipeline, one picture at a time: most take one reference a call."""

    def fingerprint(self) -> str:
        settings = self.recipe.evaluate.pipeline
        said = sha256_json(settings.model_dump(mode="json"))
        return f"{models.fingerprint(models.resolve(model_of(self.recipe), 'teacher'))} {said}"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        from diptych.student.canvas import fit_image

        pipe = self.context.opened("pipeline", self._open)
        settings, (height, width) = self.recipe.evaluate.pipeline, size_of(references)
        tall, wide = (settings.size, settings.size) if settings.size else (height, width)
        argument = settings.argument or reference_argument(pipe)
        drawn = []
        for reference, sample, seed in zip(references, samples, seeds, strict=True):
            prompt = settings.prompt.replace("{prompt}", sample.prompt)
            seen = fit_image(reference, tall, wide)
            given = arguments(pipe, argument, seen, prompt, seed, tall, wide, settings.steps, settings.options)
            drawn.append(fit_image(pipe(**given).images[0], height, width))
        return drawn

    def _open(self) -> Any:
        import torch

        from diptych.utils.machine import pick_device, pick_precision

        folder = models.resolve(model_of(self.recipe), "teacher")
        device = pick_device(self.recipe.device)
        dtype = getattr(torch, pick_precision(self.recipe.paint.dtype, device)[0])
        pipe = open_pipeline(folder, dtype, "pipeline")
        reference_argument(pipe, self.recipe.evaluate.pipeline.argument)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


def model_of(recipe: Recipe) -> str:
    """The pipeline that the recipe names. UsageError if it names none."""
    model = recipe.evaluate.pipeline.model
    if model is None:
        raise UsageError("evaluate.methods has pipeline, and evaluate.pipeline.model names none")
    return model


def parameters(pipe: Any) -> set[str]:
    """The names of the arguments that its call takes."""
    return set(inspect.signature(type(pipe).__call__).parameters) - {"self", "args", "kwargs"}


def reference_argument(pipe: Any, asked: str | None = None) -> str:
    """What the pipeline's call names a reference; `asked` if it has that. UsageError if it takes none."""
    known, name = parameters(pipe), type(pipe).__name__
    if asked is not None:
        if asked not in known:
            hint = nearest(asked, known)
            raise UsageError(f"evaluate.pipeline.argument: {name} takes no argument '{asked}'{hint}")
        return asked
    if not known & set(NOT_REFERENCES):
        for own in NAMES:
            if own in known:
                return own
        adapters = getattr(getattr(pipe, "transformer", None), "encoder_hid_proj", None)
        if ADAPTED in known and adapters is not None:
            return ADAPTED
    raise UsageError(
        f"{name} takes no reference picture (none of {', '.join(NAMES)}, or only one to start from or fill in); "
        "take another model, or name the argument with evaluate.pipeline.argument"
    )


def arguments(
    pipe: Any,
    argument: str,
    reference: Image,
    prompt: str,
    seed: int,
    height: int,
    width: int,
    steps: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The keyword arguments of one call: those that it has of what is asked. UsageError for an option it has not."""
    import torch

    known = parameters(pipe)
    if taken := sorted(set(options) & {argument, *GIVEN}):
        raise UsageError(f"evaluate.pipeline.options: {', '.join(taken)} follow from the suite and the recipe")
    if unknown := sorted(set(options) - known):
        hint = nearest(unknown[0], known)
        raise UsageError(f"evaluate.pipeline.options: {type(pipe).__name__} takes no '{unknown[0]}'{hint}")
    given: dict[str, Any] = {argument: [reference] if argument in LISTS else reference, "prompt": prompt}
    given |= {"generator": torch.Generator("cpu").manual_seed(seed), "height": height, "width": width}
    given |= {"output_type": "pil"} | ({} if steps is None else {"num_inference_steps": steps})
    given |= {name: choose(height, width) for name, choose in SIZES.items()} | dict(teachers.guess(pipe).switches)
    return {name: value for name, value in given.items() if name in known} | options
