"""The baselines without training, and the anchors.

- `text_only`: the teacher generates one panel from the prompt and does not see the reference.
- `copy`: the reference itself.
- `inpaint`: the teacher generates a 1×2 grid whose left panel is set to the reference at every step, x_left(t) =
  (1 − σ)·z + σ·ε, which is the path of rectified flow to z ("diptych prompting"). Stock `FluxPipeline` and a callback.
- `pipeline`: any diffusers pipeline with a reference input: Kontext, FLUX.2, Qwen-Image-Edit, …. Reference, prompt,
  seed, size and steps go to the arguments in the signature of the pipeline's call. Other arguments (guidance, negative
  prompts) come from the recipe's `evaluate.pipeline.options`, under the pipeline's names.
- `truth`, `other`: anchors from the renderer: the true image for the prompt, and the same scene with another subject.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diptych.errors import UsageError, nearest
from diptych.evaluate.methods.common import Base, encode, noise, sample_teacher, size_of
from diptych.student.families import teachers
from diptych.utils import models
from diptych.utils.io import sha256_json
from diptych.utils.opening import open_pipeline

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from diptych.evaluate.suites import Sample
    from diptych.recipe.schema import Recipe

# Names of a reference argument, the least ambiguous first. An IP-Adapter's image counts where an adapter is loaded.
NAMES = ("reference_image", "reference_images", "image_reference", "input_images", "control_image", "image")
LISTS = ("reference_images", "input_images")
ADAPTED = "ip_adapter_image"
# In pipelines with these arguments, `image` is a start image or an image to fill in.
NOT_REFERENCES = ("strength", "mask_image")
# Arguments that keep a pipeline from choosing another size than the sample's.
SIZES = {"_auto_resize": lambda height, width: False, "max_area": lambda height, width: height * width}
GIVEN = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")  # by the sample and the recipe


class TextOnly(Base):
    """The teacher with the prompt alone."""

    def fingerprint(self) -> str:
        return models.fingerprint(models.resolve(self.recipe.teacher, "teacher"))

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        pipe = self.context.teacher()
        height, width = size_of(references)
        latents = noise(pipe, seeds, height, width)
        return sample_teacher(pipe, [s.prompt for s in samples], height, width, latents, self.recipe)


class Inpaint(TextOnly):
    """The teacher generates a grid whose left panel is set to the reference."""

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        height, width = size_of(references)
        grids = self.grids(references, [s.grid_prompt for s in samples], seeds)
        return [grid.crop((width, 0, 2 * width, height)) for grid in grids]

    def grids(self, references: Sequence[Image], prompts: list[str], seeds: Sequence[int], **more: Any) -> list[Any]:
        """The whole grids; the left panel is the reference through the VAE. `more` goes to the pipeline."""
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

        more |= {"callback_on_step_end": hold}
        return sample_teacher(pipe, prompts, height, 2 * width, latents, self.recipe, **more)


class Copy(Base):
    """The reference, whatever the prompt."""

    def fingerprint(self) -> str:
        return "copy"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return list(references)


class Truth(Base):
    """The true image for the prompt, from the renderer."""

    def fingerprint(self) -> str:
        return "truth"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return [self.context.suite.truth(sample) for sample in samples]


class Other(Base):
    """The scene of the prompt with another subject of the kind, from the renderer."""

    def fingerprint(self) -> str:
        return "other"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        return [self.context.suite.other(sample) for sample in samples]


# ---- any pipeline


class Stock(Base):
    """A stock pipeline, one image at a time, since most take one reference a call."""

    def fingerprint(self) -> str:
        settings = sha256_json(self.recipe.evaluate.pipeline.model_dump(mode="json"))
        return f"{models.fingerprint(models.resolve(model_of(self.recipe), 'teacher'))} {settings}"

    def generate(self, references: Sequence[Image], samples: Sequence[Sample], seeds: Sequence[int]) -> Sequence[Image]:
        from diptych.student.canvas import fit_image

        pipe = self.context.opened("pipeline", self._open)
        settings, (height, width) = self.recipe.evaluate.pipeline, size_of(references)
        tall, wide = (settings.size, settings.size) if settings.size else (height, width)
        argument = settings.argument or reference_argument(pipe)
        images = []
        for reference, sample, seed in zip(references, samples, seeds, strict=True):
            prompt = settings.prompt.replace("{prompt}", sample.prompt)
            fitted = fit_image(reference, tall, wide)
            given = arguments(pipe, argument, fitted, prompt, seed, tall, wide, settings.steps, settings.options)
            images.append(fit_image(pipe(**given).images[0], height, width))
        return images

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
        message = "The method pipeline needs a model. Set evaluate.pipeline.model to a folder or hub name."
        raise UsageError("method_unsuited", message)
    return model


def parameters(pipe: Any) -> set[str]:
    """The names of the arguments that a pipeline's call takes."""
    return set(inspect.signature(type(pipe).__call__).parameters) - {"self", "args", "kwargs"}


def reference_argument(pipe: Any, name: str | None = None) -> str:
    """The argument of the pipeline's call that takes the reference: `name`, or one that the call has.

    UsageError if the call does not have `name`, or takes no reference.
    """
    known, kind = parameters(pipe), type(pipe).__name__
    if name is not None:
        if name not in known:
            hint = nearest(name, known)
            raise UsageError("recipe_invalid", f"evaluate.pipeline.argument: {kind} takes no argument '{name}'{hint}")
        return name
    if not known & set(NOT_REFERENCES):
        for each in NAMES:
            if each in known:
                return each
        adapters = getattr(getattr(pipe, "transformer", None), "encoder_hid_proj", None)
        if ADAPTED in known and adapters is not None:
            return ADAPTED
    raise UsageError(
        "method_unsuited",
        f"{kind} takes no reference image: its call has none of {', '.join(NAMES)}, or only an image to start from or "
        "fill in. Choose another model, or set evaluate.pipeline.argument.",
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
    """The keyword arguments of one call, without those that the call does not have. UsageError for an unknown option.

    Args:
        options: further arguments, as the recipe's `evaluate.pipeline.options`.
    """
    import torch

    known = parameters(pipe)
    if taken := sorted(set(options) & {argument, *GIVEN}):
        message = f"evaluate.pipeline.options: the suite and the recipe already set {', '.join(taken)}. Remove them."
        raise UsageError("recipe_conflict", message)
    if unknown := sorted(set(options) - known):
        hint = f"{type(pipe).__name__} takes no argument '{unknown[0]}'{nearest(unknown[0], known)}"
        raise UsageError("recipe_invalid", f"evaluate.pipeline.options: {hint}")
    given: dict[str, Any] = {argument: [reference] if argument in LISTS else reference, "prompt": prompt}
    given |= {"generator": torch.Generator("cpu").manual_seed(seed), "height": height, "width": width}
    given |= {"output_type": "pil"} | ({} if steps is None else {"num_inference_steps": steps})
    given |= {name: choose(height, width) for name, choose in SIZES.items()} | dict(teachers.guess(pipe).switches)
    return {name: value for name, value in given.items() if name in known} | options
