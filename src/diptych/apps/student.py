"""`Student`: the one object most people need. A model by name or folder, and pictures from references and prompts.

    from diptych import Student
    student = Student.load("pocket")
    student.generate(reference, "a cat on a beach at sunset", seed=0).save("cat.png")

Everything below it is `diptych.student`; what diffusers can do to a pipeline (offload, compile, caches, LoRA) is done
on `student.pipeline`.
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from diptych.errors import UsageError
from diptych.student.runtime.memory import explains_exhaustion, less_than
from diptych.student.sampling import (
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
from diptych.utils.machine import VERSION, check_device
from diptych.utils.models import quick_fingerprint, with_scale

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diptych.apps.story import Captions, Page, Panel
    from diptych.student.canvas import Canvas
    from diptych.student.loading import Loras
    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.runtime.memory import Preset
    from diptych.student.runtime.speed import Speed

    Reference = Image.Image | str | Path | None

log = logging.getLogger("diptych.apps.student")
UNKNOWN = "the model does not know %s; the picture will not show it"


class Student:
    """A student that is loaded and ready. `pipeline` is the diffusers pipeline inside."""

    def __init__(
        self,
        pipeline: DiptychPipeline,
        name: str = "",
        *,
        sampling: dict[str, float] | None = None,
    ) -> None:
        own = pipeline.settings
        self.pipeline = pipeline
        self.name = name
        self.sampling = own.sampling | (sampling or {})  # for what a call of `generate` does not say
        self.words = own.words and frozenset(own.words)  # all that a small model can read; None: no such limit
        self._said: set[str] = set()
        self._reading, self._tokenizer = threading.Lock(), None  # of `warnings`
        self._projection: torch.Tensor | None = None  # for previews; fitted when one is first asked for

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
        """Opens `pocket`, a folder, or a hub name; the arguments are those of `diptych.student.load`, and these:

        Args:
            speed, switches: `exact`, `fast` or `fastest`, and single switches (`"decode=right"`) on top; see
                `student.speed`. None: as the released sampler.
            parallel: draw each picture on all GPUs that `torchrun` started processes for; see `student.parallel`.
            progress_bar: show the bars of diffusers and transformers, while loading and drawing.

        LoRAs are fused by default: the picture is the same to float rounding, and drawn faster.
        Raises UserError, UsageError: one line that says what is missing, damaged or unknown, and what to do.
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
            raise UsageError("a memory preset moves weights about, and several GPUs need them in place; choose one")
        if parallel:
            device = gpus.join(device)
        said = explains_exhaustion(
            f"loading {model}", f"Use {less_than(memory)}; `diptych doctor` shows what this machine can run"
        )
        with nullcontext() if progress_bar else quiet_bars(), said:
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
        """Draws the reference's subject as the prompt asks; one picture, or a list if any argument is a list.

        Lists multiply: every reference with every prompt with every seed, seeds running fastest. The same reference,
        prompt, seed and options give the same picture, alone or among others (bit for bit at the same `batch_size` of
        1, the default; larger batches may round differently).

        Args:
            reference: a PIL image, an image file, or None (text alone); `[[a, b]]` gives one image both, as tokens.
            prompt: what the new picture shows, the whole of it.
            seed: 0 to 2^63 - 1.
            options: of `student.sampling.GenerateOptions`: steps, guidance, size, fit, batch_size, …

        Returns:
            An RGB image, or a list of them; `image.info` says what made each (model, prompt, seed, options, versions).

        Raises:
            UsageError for arguments that do not fit, UserError for a reference that cannot be read.
        """
        asked = given(options, GenerateOptions)
        check_options(asked)
        prompts, seeds, batch_size = as_list(prompt), as_list(seed), asked.get("batch_size", 1)
        for text in prompts:
            check_prompt(text)
            self._warn_of_words(text)
        for number in seeds:
            check_seed(number)
        if batch_size < 1:
            raise UsageError(f"batch_size is at least 1, not {batch_size}")
        fit, background = asked.get("fit", "crop"), asked.get("background", "white")
        negative_prompt, null_panel = asked.get("negative_prompt"), asked.get("null_panel")
        canvas = self.canvas(asked.get("size"))
        references = [self.opened(r, background) for r in as_list(reference)]
        sampling = self.sampling | {name: asked[name] for name in SCALES if name in asked}
        for line in self._remarks(canvas, negative_prompt, sampling, any(r is not None for r in references)):
            log.warning(line)
        settings = {**sampling, "negative_prompt": negative_prompt, "fit": fit, "background": background}
        seen = null_panel or self.pipeline.runtime.speed.null_panel or self.pipeline.settings.null_panel
        settings |= {"null_panel": seen} if seen != "shared" else {}
        callbacks = self._callbacks(canvas, asked)
        images: list[Image.Image] = []
        # One PIL object per reference, so that the pipeline can tell a repeated one.
        pairwise = asked.get("pairwise", False)
        if pairwise and not len(references) == len(prompts) == len(seeds):
            raise UsageError(f"{len(references)} references, {len(prompts)} prompts and {len(seeds)} seeds: pairwise")
        wishes = list(zip(references, prompts, seeds, strict=True) if pairwise else product(references, prompts, seeds))
        for start in range(0, len(wishes), batch_size):
            batch = wishes[start : start + batch_size]
            with explains_exhaustion(*self._too_much(canvas, len(batch))):
                drawn = self.pipeline(
                    prompt=[text for _, text, _ in batch],
                    reference=[picture for picture, _, _ in batch],
                    generator=[number for _, _, number in batch],
                    height=canvas.panel_height,
                    width=canvas.panel_width,
                    num_inference_steps=int(sampling["steps"]),
                    guidance_scale=sampling["guidance"],
                    image_guidance_scale=sampling["image_guidance"],
                    text_guidance_scale=sampling["text_guidance"],
                    null_panel=null_panel,
                    negative_prompt=negative_prompt,
                    fit=fit,
                    **callbacks,
                )
            assert not isinstance(drawn, tuple)
            for image, (_, text, number) in zip(drawn.images, batch, strict=True):
                image.info = {"prompt": text, "seed": number, **settings, **self._provenance(image)}
                images.append(image)
        return images if any(isinstance(x, (list, tuple)) for x in (reference, prompt, seed)) else images[0]

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that this model was never taught, in order, each once; empty if it has no word list."""
        if self.words is None:
            return []
        found = dict.fromkeys(word.strip("-") for word in re.findall(r"[\w-]+", text.lower()))
        return [word for word in found if word and word not in self.words]

    def _warn_of_words(self, text: str) -> None:
        unknown = [word for word in self.unknown_words(text) if word not in self._said]
        if unknown:
            self._said.update(unknown)
            log.warning(UNKNOWN, ", ".join(map(repr, unknown)), extra={"quotes": True})

    def _remarks(
        self, canvas: Canvas, negative_prompt: str | None, sampling: Mapping[str, float], referenced: bool
    ) -> list[str]:
        """What to know of a picture with these options, whatever its prompt."""
        found, settings = [], self.pipeline.settings
        if not settings.trained_at(canvas.panel_height, canvas.panel_width):
            trained = ", ".join(f"{width}×{height}" for height, width in settings.sizes or ())
            size = f"{canvas.panel_width}×{canvas.panel_height}"
            found.append(f"the model was trained at {trained} pixels; at {size} expect distorted or repeated shapes")
        acting = ("image_guidance", "text_guidance") if referenced else ("text_guidance",)
        if negative_prompt and all(sampling[name] <= 1 for name in acting):
            found.append("the negative prompt does nothing unless image or text guidance is above 1")
        return found

    def warnings(
        self,
        prompt: str,
        size: int | tuple[int, int] | None = None,
        negative_prompt: str | None = None,
        referenced: bool = True,
        **guidance: float,
    ) -> list[str]:
        """What the log says when `generate` makes a picture of these arguments: words that the model does not know,
        text that it does not read, options that do nothing. Makes nothing; any thread may call."""
        unknown = ", ".join(map(repr, self.unknown_words(prompt)))
        found = [UNKNOWN % unknown] if unknown else []
        with self._reading:
            if self._tokenizer is None:  # another than the pipeline's, which may be in use in another thread
                self._tokenizer = copy.deepcopy(self.pipeline.tokenizer_2)
            for text in filter(None, (prompt, negative_prompt)):
                if self._tokenizer is not None and (
                    cut := self.pipeline.unread(self.pipeline.settings.read(text), self._tokenizer)
                ):
                    found.append(cut)
        return found + self._remarks(self.canvas(size), negative_prompt, self.sampling | guidance, referenced)

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
        """The reference's scene under another light ("soft golden light from the left"), everything in its place.

        Returns one image, or a list if `light` or `seed` is a list; for the arguments see `apps.relight.relight`.
        Raises UsageError for what does not fit together, UserError for an image that cannot be read.
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
        """A page of 4 to 10 panels that show the reference's character; for the arguments see `apps.story.story`.

        The page saves itself: `page.save("story.pdf")`. `options` are those of `generate`.
        """
        from diptych.apps.story import story

        return story(
            self, reference, panels, seed=seed, title=title, captions=captions, font=font, on_panel=on_panel, **options
        )

    def opened(self, reference: Reference | Sequence[Reference], background: str = "white") -> Any:
        """A reference as the model is shown it, before it is fitted: upright RGB over `background`."""
        from PIL import Image

        from diptych.data.images import open_image, to_rgb

        if isinstance(reference, (list, tuple)):  # all of one image
            return [self.opened(each, background) for each in reference]
        if reference is None or isinstance(reference, Image.Image):
            return None if reference is None else to_rgb(reference, background)
        if not isinstance(reference, (str, Path)):
            raise UsageError(f"a reference is a PIL image, an image file or None, not {type(reference).__name__}")
        return open_image(reference, background=background)

    def canvas(self, size: int | tuple[int, int] | None = None) -> Canvas:
        """The canvas for pictures of a size, by default the model's own. UsageError if the model does not take it."""
        from diptych.student.runtime.parallel import check

        width, height = (size, size) if isinstance(size, int) or size is None else size
        canvas = self.pipeline.canvas(height, width)
        check(self.pipeline, canvas)
        return canvas

    def _callbacks(self, canvas: Canvas, asked: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments for what is called after each step: previews first, which change nothing."""
        from diptych.student.callbacks import Preview, fit_projection, in_turn

        given, inputs = asked.get("callback_on_step_end"), asked.get("callback_on_step_end_tensor_inputs", ("latents",))
        each = [given] if given is not None else []
        if "on_preview" in asked:
            if self._projection is None:
                self._projection = fit_projection(self.pipeline)
            each.insert(0, Preview(asked["on_preview"], canvas, self._projection, asked.get("preview_every", 1)))
            inputs = (*inputs, *({"latents"} - set(inputs)))
        if not each:
            return {}
        return {"callback_on_step_end": in_turn(each), "callback_on_step_end_tensor_inputs": list(inputs)}

    def _too_much(self, canvas: Canvas, count: int) -> tuple[str, str]:
        """What is generated when memory runs out, and what to do."""
        what = f"{count} images" if count > 1 else "an image"
        less = "fewer images at once, or a smaller size" if count > 1 else "a smaller size, or a smaller model"
        instead = f"Use {less}, or {less_than(self.pipeline.runtime.memory)}"
        return f"generating {what} of {canvas.panel_width}×{canvas.panel_height}", instead

    def _provenance(self, image: Image.Image) -> dict[str, Any]:
        import diffusers
        import torch

        pipeline = self.pipeline
        loras = [{"file": p.name, "scale": scale, "fingerprint": quick_fingerprint(p)} for p, scale in pipeline.loras]
        held = {} if pipeline.runtime.memory is None else {"memory": asdict(pipeline.runtime.memory.preset)}
        return {
            "model": self.name,
            "fingerprints": [quick_fingerprint(folder) for folder in pipeline.loaded_from],
            **({"loras": loras} if loras else {}),
            **held,
            "width": image.width,
            "height": image.height,
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "device": pipeline.device.type,
            "speed": pipeline.runtime.speed.changed(),
            "versions": {"diptych": VERSION, "diffusers": diffusers.__version__, "torch": torch.__version__},
        }
