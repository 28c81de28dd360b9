"""`Student`: opens a model by name or folder and generates images from references and prompts.

    from diptych import Student
    student = Student.load("pocket")
    student.generate(reference, "a cat on a beach at sunset", seed=0).save("cat.png")

It is a front for `diptych.student`. For what diffusers can do to a pipeline (offload, compile, caches, LoRA), use
`student.pipeline`.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from diptych.apps import about
from diptych.errors import UsageError
from diptych.student.runtime.memory import explains_exhaustion, less_than
from diptych.student.sampling import (
    CORRECTIONS,
    SCALES,
    GenerateOptions,
    RelightOptions,
    as_list,
    check_options,
    check_prompt,
    check_seed,
    given,
    lists,
)
from diptych.utils.machine import check_device
from diptych.utils.models import with_scale

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diptych.apps.story import Captions, Page, Panel
    from diptych.student.canvas import Canvas
    from diptych.student.loading import Loras
    from diptych.student.reference_pipeline import ReferencePipeline
    from diptych.student.runtime.memory import Preset
    from diptych.student.runtime.speed import Speed

    Reference = Image.Image | str | Path | None

log = logging.getLogger("diptych.apps.student")
UNKNOWN = "not in the model's vocabulary: %s. The image will not show it"


class Student:
    """A loaded student. `pipeline` is its diffusers pipeline."""

    def __init__(
        self,
        pipeline: ReferencePipeline,
        name: str = "",
        *,
        sampling: dict[str, float] | None = None,
    ) -> None:
        settings = pipeline.settings
        self.pipeline, self.name = pipeline, name
        self.sampling = settings.sampling | (sampling or {})  # the defaults of `generate`
        self.words = settings.words and frozenset(settings.words)  # a small model's vocabulary; None: unlimited
        self._reported: set[str] = set()  # unknown words that the log has already
        self._reading, self._tokenizer = threading.Lock(), None  # for `warnings`
        self._projection: torch.Tensor | None = None  # for previews; fitted at the first one

    @classmethod
    def load(
        cls,
        model: str | Path = "pocket",
        base: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        lora: Loras = (),
        released_lora: bool = True,
        fuse: bool = True,
        memory: str | int | Preset | None = None,
        speed: str | Speed | None = None,
        switches: Sequence[str] = (),
        parallel: bool = False,
        progress_bar: bool = True,
    ) -> Student:
        """Opens `pocket`, a folder, or a hub name. Takes the arguments of `diptych.student.load`, and these:

        Args:
            speed, switches: `exact`, `fast` or `fastest`, and single switches (`"decode=right"`) on top; see
                `student.runtime.speed`. None: as the released sampler.
            parallel: generate each image on all GPUs that `torchrun` starts; see `student.runtime.parallel`.
            progress_bar: show the bars of diffusers and transformers, while loading and generating.

        LoRAs are fused by default, which is faster and gives the same image up to float rounding.
        Raises UserError and UsageError, which name what is missing, damaged or unknown, and what to do.
        """
        from diptych.student import load
        from diptych.student.loading import scaled
        from diptych.student.runtime import parallel as gpus
        from diptych.student.runtime import speed as speeds
        from diptych.student.runtime.applied import apply_speed
        from diptych.utils.console import quiet_bars

        check_device(device)
        quick = speeds.parse(speed, switches)
        if quick.few_step_lora:
            lora = [*scaled(lora), with_scale(quick.few_step_lora)]
        if parallel and memory is not None:
            raise UsageError("option_conflict", "parallel does not work with a memory preset. Leave one of them out.")
        if parallel:
            device = gpus.join(device)
        explained = explains_exhaustion(
            f"loading {model}", f"Use {less_than(memory)}; `diptych doctor` shows what this machine can do"
        )
        with nullcontext() if progress_bar else quiet_bars(), explained:
            pipeline = load(
                model,
                base,
                device=device,
                dtype=dtype,
                lora=lora,
                released_lora=released_lora,
                fuse=fuse,
                memory=memory,
            )
        apply_speed(pipeline, quick)
        if parallel:
            gpus.split(pipeline)
        if not progress_bar:
            pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, str(model), sampling={"steps": quick.steps} if quick.steps else None)

    @overload
    def generate(
        self, reference: Reference, prompt: str, *, seed: int = 0, **options: Unpack[GenerateOptions]
    ) -> Image.Image: ...

    @overload
    def generate(
        self,
        reference: Reference | Sequence[Reference | Sequence[Reference]],
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[GenerateOptions],
    ) -> list[Image.Image]: ...

    @lists(GenerateOptions)
    def generate(
        self,
        reference: Reference | Sequence[Reference | Sequence[Reference]],
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[GenerateOptions],
    ) -> Image.Image | list[Image.Image]:
        """Generates an image of the reference's subject that follows the prompt.

        Lists multiply: every reference with every prompt with every seed; the seed changes fastest. The same
        reference, prompt, seed and options give the same image, alone or among others. At a `batch_size` of 1, the
        default, it is the same bit for bit; larger batches may round differently.

        Args:
            reference: a PIL image or a file, or None for text alone; `[[a, b]]` gives one image both, as tokens.
            prompt: the whole content of the new image.
            seed: 0 to 2^63 - 1.
            options: of `student.sampling.GenerateOptions`: steps, guidance, size, fit, batch_size, …

        Returns an RGB image, or a list if any argument is a list. `image.info` records what made each image.
        Raises UsageError for arguments that do not fit, UserError for a reference that cannot be read.
        """
        chosen = given(options, GenerateOptions)
        check_options(chosen)
        prompts, seeds, batch_size = as_list(prompt), as_list(seed), chosen.get("batch_size", 1)
        for text in prompts:
            check_prompt(text)
            self._warn_of_words(text)
        for number in seeds:
            check_seed(number)
        if batch_size < 1:
            raise UsageError("option_invalid", f"batch_size must be at least 1, not {batch_size}")
        fit, background = chosen.get("fit", "crop"), chosen.get("background", "white")
        negative_prompt, null_panel = chosen.get("negative_prompt"), chosen.get("null_panel")
        canvas = self.canvas(chosen.get("size"))
        references = [self.opened(r, background) for r in as_list(reference)]
        sampling = self.sampling | {name: chosen[name] for name in SCALES if name in chosen}
        for line in self._remarks(canvas, negative_prompt, sampling, any(r is not None for r in references)):
            log.warning(line)
        settings = {**sampling, "negative_prompt": negative_prompt, "fit": fit, "background": background}
        seen = null_panel or self.pipeline.runtime.speed.null_panel or self.pipeline.settings.null_panel
        corrections = {name: chosen[name] for name in CORRECTIONS if name in chosen}
        settings |= corrections | ({"null_panel": seen} if seen != "shared" else {})
        more = {"null_panel": null_panel, **corrections, **self._callbacks(canvas, chosen)}
        images: list[Image.Image] = []
        # One PIL object per reference, so that the pipeline recognizes a repeated one.
        if (pairwise := chosen.get("pairwise", False)) and not len(references) == len(prompts) == len(seeds):
            counts = f"{len(references)} references, {len(prompts)} prompts and {len(seeds)} seeds"
            raise UsageError("count_mismatch", f"pairwise needs equal counts, not {counts}")
        rows = list(zip(references, prompts, seeds, strict=True) if pairwise else product(references, prompts, seeds))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            with explains_exhaustion(*self._too_much(canvas, len(batch))):
                output = self.pipeline(
                    prompt=[text for _, text, _ in batch],
                    reference=[image for image, _, _ in batch],
                    generator=[number for _, _, number in batch],
                    height=canvas.panel_height,
                    width=canvas.panel_width,
                    num_inference_steps=int(sampling["steps"]),
                    guidance_scale=sampling["guidance"],
                    image_guidance_scale=sampling["image_guidance"],
                    text_guidance_scale=sampling["text_guidance"],
                    negative_prompt=negative_prompt,
                    fit=fit,
                    **more,
                )
            assert not isinstance(output, tuple) and isinstance(output.images, list)
            for image, (_, text, number) in zip(output.images, batch, strict=True):
                image.info = {"prompt": text, "seed": number, **settings, **about.provenance(self, image)}
                images.append(image)
        return images if any(isinstance(x, (list, tuple)) for x in (reference, prompt, seed)) else images[0]

    def unknown_words(self, text: str) -> list[str]:
        """Returns the words of `text` outside the model's vocabulary, in order, each once."""
        if self.words is None:
            return []
        words = dict.fromkeys(word.strip("-") for word in re.findall(r"[\w-]+", text.lower()))
        return [word for word in words if word and word not in self.words]

    def _warn_of_words(self, text: str) -> None:
        unknown = [word for word in self.unknown_words(text) if word not in self._reported]
        if unknown:
            self._reported.update(unknown)
            log.warning(UNKNOWN, ", ".join(map(repr, unknown)), extra={"quotes": True})

    def _remarks(
        self, canvas: Canvas, negative_prompt: str | None, sampling: Mapping[str, float], referenced: bool
    ) -> list[str]:
        """Warnings about an image with these options, whatever its prompt."""
        remarks, settings = [], self.pipeline.settings
        if not settings.trained_at(canvas.panel_height, canvas.panel_width):
            trained = ", ".join(f"{width}×{height}" for height, width in settings.sizes or ())
            size = f"{canvas.panel_width}×{canvas.panel_height}"
            remarks.append(f"the model was trained at {trained} pixels; at {size} expect distorted or repeated shapes")
        scales = ("image_guidance", "text_guidance") if referenced else ("text_guidance",)
        if negative_prompt and all(sampling[name] <= 1 for name in scales):
            remarks.append("the negative prompt does nothing unless image or text guidance is above 1")
        return remarks

    def warnings(
        self,
        prompt: str,
        size: int | tuple[int, int] | None = None,
        negative_prompt: str | None = None,
        referenced: bool = True,
        **guidance: float,
    ) -> list[str]:
        """Returns the warnings that `generate` would log for these arguments, without generating.

        They name unknown words, text that is cut off, and options that do nothing. Any thread may call this.
        """
        unknown = ", ".join(map(repr, self.unknown_words(prompt)))
        warnings = [UNKNOWN % unknown] if unknown else []
        with self._reading:
            if self._tokenizer is None:  # a copy: the pipeline's may be in use in another thread
                self._tokenizer = copy.deepcopy(self.pipeline.reader)
            for text in filter(None, (prompt, negative_prompt)):
                if self._tokenizer is not None and (
                    cut := self.pipeline.unread(self.pipeline.settings.read(text), self._tokenizer)
                ):
                    warnings.append(cut)
        return warnings + self._remarks(self.canvas(size), negative_prompt, self.sampling | guidance, referenced)

    @overload
    def relight(
        self, reference: Image.Image | str | Path, light: str, *, seed: int = 0, **options: Unpack[RelightOptions]
    ) -> Image.Image: ...

    @overload
    def relight(
        self,
        reference: Image.Image | str | Path,
        light: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[RelightOptions],
    ) -> list[Image.Image]: ...

    @lists(RelightOptions)
    def relight(
        self,
        reference: Image.Image | str | Path,
        light: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[RelightOptions],
    ) -> Image.Image | list[Image.Image]:
        """Returns the reference's scene under another light ("soft golden light from the left"), everything in place.

        Returns a list if `light` or `seed` is a list. For the arguments see `apps.relight.relight`.
        Raises UsageError for arguments that do not fit together, UserError for an image that cannot be read.
        """
        from diptych.apps.relight import relight

        return relight(self, reference, light, seed=seed, **options)

    def story(
        self,
        reference: Reference,
        panels: Sequence[Panel | str],
        *,
        seed: int | Sequence[int] = 0,
        title: str = "",
        captions: Captions = "below",
        font: str | Path | None = None,
        on_panel: Callable[[int, int], object] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Page:
        """Returns a page of 4 to 10 panels that show the reference's character, to save as `page.save("story.pdf")`.

        For the arguments see `apps.story.story`. `options` are those of `generate`.
        """
        from diptych.apps.story import story

        return story(
            self, reference, panels, seed=seed, title=title, captions=captions, font=font, on_panel=on_panel, **options
        )

    def opened(self, reference: Reference | Sequence[Reference], background: str = "white") -> Any:
        """Returns a reference (or a list of them) as upright RGB over `background`, not yet fitted to the canvas."""
        from PIL import Image

        from diptych.data.images import open_image, to_rgb

        if isinstance(reference, (list, tuple)):  # several of one image
            return [self.opened(each, background) for each in reference]
        if reference is None or isinstance(reference, Image.Image):
            return None if reference is None else to_rgb(reference, background)
        if not isinstance(reference, (str, Path)):
            kind = type(reference).__name__
            raise UsageError("argument_type", f"reference must be a PIL image, an image file or None, not {kind}")
        return open_image(reference, background=background)

    def canvas(self, size: int | tuple[int, int] | None = None) -> Canvas:
        """Returns the canvas for an image size, by default the model's. UsageError if the model does not accept it."""
        from diptych.student.runtime.parallel import check

        width, height = (size, size) if isinstance(size, int) or size is None else size
        canvas = self.pipeline.canvas(height, width)
        check(self.pipeline, canvas)
        return canvas

    def _callbacks(self, canvas: Canvas, chosen: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments for callbacks after each step. Previews come first, since they change nothing."""
        from diptych.student.callbacks import Preview, fit_projection, in_turn

        inputs = chosen.get("callback_on_step_end_tensor_inputs", ("latents",))
        callbacks = [chosen["callback_on_step_end"]] if "callback_on_step_end" in chosen else []
        if "on_preview" in chosen:
            if self._projection is None:
                self._projection = fit_projection(self.pipeline)
            every = chosen.get("preview_every", 1)
            callbacks.insert(0, Preview(chosen["on_preview"], canvas, self._projection, every))
            inputs = (*inputs, *({"latents"} - set(inputs)))
        if not callbacks:
            return {}
        return {"callback_on_step_end": in_turn(callbacks), "callback_on_step_end_tensor_inputs": list(inputs)}

    def _too_much(self, canvas: Canvas, count: int) -> tuple[str, str]:
        """What was being generated when memory ran out, and what to do."""
        what, less = (f"{count} images", "fewer images at once") if count > 1 else ("an image", "a smaller model")
        instead = f"Use a smaller size, {less}, or {less_than(self.pipeline.runtime.memory)}"
        return f"generating {what} of {canvas.panel_width}×{canvas.panel_height}", instead

    def _repr_html_(self) -> str:
        return about.html(self)

    def __repr__(self) -> str:
        return f"Student({', '.join(f'{name}: {text}' for name, text in about.facts(self).items())})"
