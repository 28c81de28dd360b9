"""`Student`: the one object most people need. A model by name or folder, and pictures from references and prompts.

    from diptych import Student
    student = Student.load("pocket")
    student.generate(reference, "a cat on a beach at sunset", seed=0).save("cat.png")

Everything below it is `diptych.student`; what diffusers can do to a pipeline (offload, compile, caches, LoRA) is done
on `student.pipeline`.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

from diptych.errors import UsageError, UserError
from diptych.utils.models import with_scale

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diptych.apps.story import Captions, Page, Panel
    from diptych.student.callbacks import Show
    from diptych.student.canvas import Canvas
    from diptych.student.loading import Loras
    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.runtime.memory import Preset
    from diptych.student.runtime.speed import Speed

    Reference = Image.Image | str | Path | None

log = logging.getLogger("diptych.apps.student")
HASHED_BYTES = 2 * 2**30  # larger models are named but not hashed: FLUX would take minutes before its first picture
_T = TypeVar("_T")


class _Options(TypedDict, total=False):
    steps: int | None
    guidance: float | None
    image_guidance: float | None
    text_guidance: float | None
    null_panel: str | None
    negative_prompt: str | None
    size: int | tuple[int, int] | None
    background: str
    on_preview: Show | None
    preview_every: int
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None


class GenerateOptions(_Options, total=False):
    """The options of `Student.generate` that are the same for all images of a call."""

    fit: str
    batch_size: int
    pairwise: bool
    callback_on_step_end_tensor_inputs: Sequence[str]


class RelightOptions(_Options, total=False):
    """The options of `Student.relight` that are the same for all images of a call."""

    scene: str
    task: str
    mask: Image.Image | str | Path | None
    detail: float
    fit: str | None


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
        from diptych.utils.console import quiet_bars

        _check_device(device)
        quick = speeds.parse(speed, switches)
        if quick.few_step_lora:
            lora = [*scaled(lora), with_scale(quick.few_step_lora)]
        if parallel and memory is not None:
            raise UsageError("a memory preset moves weights about, and several GPUs need them in place; choose one")
        if parallel:
            device = gpus.join(device)
        said = _memory_said(f"loading {model}", f"use {_less(memory)}; `diptych doctor` says what this machine can do")
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
        speeds.apply(pipeline, quick)
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
        reference: Reference | Sequence[Reference],
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        **options: Unpack[GenerateOptions],
    ) -> list[Image.Image]: ...

    def generate(
        self,
        reference: Reference | Sequence[Reference],
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        text_guidance: float | None = None,
        null_panel: str | None = None,
        negative_prompt: str | None = None,
        size: int | tuple[int, int] | None = None,
        fit: str = "crop",
        background: str = "white",
        batch_size: int = 1,
        pairwise: bool = False,
        on_preview: Show | None = None,
        preview_every: int = 1,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Image.Image | list[Image.Image]:
        """Draws the reference's subject as the prompt asks; one picture, or a list if any argument is a list.

        Lists multiply: every reference with every prompt with every seed, seeds running fastest. The same reference,
        prompt, seed and options give the same picture, alone or among others (bit for bit at the same `batch_size` of
        1, the default; larger batches may round differently).

        Args:
            reference: a PIL image or an image file; None draws from the text alone.
            prompt: what the new picture shows, the whole of it.
            steps: sampling steps.
            guidance: distilled guidance, for models that have it (FLUX.1-dev).
            image_guidance, text_guidance: true guidance, 1 is off; see `student.pipeline`. Up to three times the work.
                None, for each of these four: the model's own setting (`pipeline.settings`); a model without any is
                sampled as the release (28, 3.5, 1, 1).
            null_panel: the left panel that guidance's null pass sees, `shared` or `own`; see `student.guidance`.
                None: the model's own setting.
            negative_prompt: what the picture should not show; it acts only where true guidance is on.
            size: side of the square picture, or (width, height), in pixels, multiples of 2 × the VAE factor; default
                the model's own.
            fit: how the reference meets that size: crop, pad or contain.
            background: the colour that a reference's transparent parts are laid over: a name or `#rrggbb`.
            batch_size: pictures drawn together.
            pairwise: the lists go together instead, one reference, prompt and seed for each picture.
            on_preview: called as `on_preview(done, steps, images)` with small previews of the batch that is being
                drawn, every `preview_every` steps; see `student.preview`. It changes nothing.
            callback_on_step_end, callback_on_step_end_tensor_inputs: diffusers', called after every step of a batch.

        Returns:
            An RGB image, or a list of them; `image.info` says what made each (model, prompt, seed, options, versions).

        Raises:
            UsageError for arguments that do not fit, UserError for a reference that cannot be read.
        """
        listed = [isinstance(x, (list, tuple)) for x in (reference, prompt, seed)]
        prompts, seeds = _as_list(prompt), _as_list(seed)
        asked = {"steps": steps, "guidance": guidance, "image_guidance": image_guidance, "text_guidance": text_guidance}
        check_options({**asked, "negative_prompt": negative_prompt, "size": size, "fit": fit, "background": background})
        for text in prompts:
            check_prompt(text)
            self._warn_of_words(text)
        for number in seeds:
            check_seed(number)
        if batch_size < 1:
            raise UsageError(f"batch_size is at least 1, not {batch_size}")
        canvas = self.canvas(size)
        references = [self.opened(r, background) for r in _as_list(reference)]
        sampling = self.sampling | {key: value for key, value in asked.items() if value is not None}
        referenced = any(r is not None for r in references)
        for line in self._remarks(canvas, negative_prompt, sampling, referenced):
            log.warning(line)
        settings = {**sampling, "negative_prompt": negative_prompt, "fit": fit, "background": background}
        seen = null_panel or self.pipeline.speed.null_panel or self.pipeline.settings.null_panel
        settings |= {"null_panel": seen} if seen != "shared" else {}
        callbacks = _Callbacks(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if on_preview is not None:
            callbacks.before(self._preview(on_preview, canvas, preview_every))
        images: list[Image.Image] = []
        # One PIL object per reference, so that the pipeline can tell a repeated one.
        if pairwise and not len(references) == len(prompts) == len(seeds):
            raise UsageError(f"{len(references)} references, {len(prompts)} prompts and {len(seeds)} seeds: pairwise")
        jobs = list(
            zip(references, prompts, seeds, strict=True) if pairwise else itertools.product(references, prompts, seeds)
        )
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            with _memory_said(*self._too_much(canvas, len(batch))):
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
                    **callbacks.arguments(),
                )
            assert not isinstance(drawn, tuple)
            for image, (_, text, number) in zip(drawn.images, batch, strict=True):
                image.info = {"prompt": text, "seed": number, **settings, **self._provenance(image)}
                images.append(image)
        return images if any(listed) else images[0]

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
            log.warning(
                "the model does not know %s; the picture will not show it",
                ", ".join(map(repr, unknown)),
                extra={"quotes": True},
            )

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
        found = [f"the model does not know {unknown}; the picture will not show it"] if unknown else []
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

    def relight(
        self,
        reference: Image.Image | str | Path,
        light: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        scene: str = "",
        task: str = "relight",
        mask: Image.Image | str | Path | None = None,
        detail: float = 1.0,
        steps: int | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        text_guidance: float | None = None,
        null_panel: str | None = None,
        negative_prompt: str | None = None,
        size: int | tuple[int, int] | None = None,
        fit: str | None = None,
        background: str = "white",
        on_preview: Show | None = None,
        preview_every: int = 1,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
    ) -> Image.Image | list[Image.Image]:
        """The reference's scene under another light ("soft golden light from the left"), everything in its place.

        Returns one image, or a list if `light` or `seed` is a list. The arguments are those of `relight.relight` and,
        from `steps` on, of `generate`. Raises UsageError for what does not fit together, UserError for an image that
        cannot be read.
        """
        from diptych.apps.relight import relight

        return relight(
            self,
            reference,
            light,
            seed=seed,
            scene=scene,
            task=task,
            mask=mask,
            detail=detail,
            size=size,
            fit=fit,
            background=background,
            callback_on_step_end=callback_on_step_end,
            steps=steps,
            guidance=guidance,
            image_guidance=image_guidance,
            text_guidance=text_guidance,
            null_panel=null_panel,
            negative_prompt=negative_prompt,
            on_preview=on_preview,
            preview_every=preview_every,
        )

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
            self,
            reference,
            panels,
            seed=seed,
            title=title,
            captions=captions,
            font=font,
            on_panel=on_panel,
            **options,
        )

    def opened(self, reference: Reference, background: str = "white") -> Image.Image | None:
        """A reference as the model is shown it, before it is fitted: upright RGB over `background`."""
        from PIL import Image

        from diptych.data.images import open_image, to_rgb

        if reference is None:
            return None
        if isinstance(reference, Image.Image):
            return to_rgb(reference, background)
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

    def _preview(self, show: Show, canvas: Canvas, every: int) -> Callable[..., dict[str, Any]]:
        from diptych.student.callbacks import Preview, fit_projection

        if self._projection is None:
            self._projection = fit_projection(self.pipeline)
        return Preview(show, canvas, self._projection, every)

    def _too_much(self, canvas: Canvas, count: int) -> tuple[str, str]:
        """What was being drawn when memory ran out, and what to do."""
        what = f"{count} pictures" if count > 1 else "a picture"
        less = "fewer at once, or a smaller size" if count > 1 else "a smaller size, or a smaller model"
        instead = f"ask for {less}, or use {_less(self.pipeline.memory)}"
        return f"drawing {what} of {canvas.panel_width}×{canvas.panel_height}", instead

    def _provenance(self, image: Image.Image) -> dict[str, Any]:
        import diffusers
        import torch

        from diptych.utils.machine import VERSION
        from diptych.utils.models import fingerprint

        def hashed(place: Path) -> str | None:
            return fingerprint(place) if _bytes(place) <= HASHED_BYTES else None

        pipeline = self.pipeline
        loras = [{"file": p.name, "scale": scale, "fingerprint": hashed(p)} for p, scale in pipeline.loras]
        held = {} if pipeline.memory is None else {"memory": asdict(pipeline.memory.preset)}
        return {
            "model": self.name,
            "fingerprints": [hashed(folder) for folder in pipeline.loaded_from],
            **({"loras": loras} if loras else {}),
            **held,
            "width": image.width,
            "height": image.height,
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "device": pipeline.device.type,
            "speed": pipeline.speed.changed(),
            "versions": {"diptych": VERSION, "diffusers": diffusers.__version__, "torch": torch.__version__},
        }


class _Callbacks:
    """Several `callback_on_step_end`s as the one that diffusers takes."""

    def __init__(self, given: Callable[..., dict[str, Any] | None] | None, inputs: Sequence[str]) -> None:
        self.each = [given] if given is not None else []
        self.inputs = tuple(inputs)

    def before(self, callback: Callable[..., dict[str, Any] | None]) -> None:
        """Adds one that sees the latents first, and changes nothing."""
        self.each.insert(0, callback)
        self.inputs = (*self.inputs, *({"latents"} - set(self.inputs)))

    def arguments(self) -> dict[str, Any]:
        if not self.each:
            return {}
        return {"callback_on_step_end": in_turn(self.each), "callback_on_step_end_tensor_inputs": list(self.inputs)}


def in_turn(callbacks: Sequence[Callable[..., dict[str, Any] | None]]) -> Callable[..., dict[str, Any]]:
    """Several `callback_on_step_end`s as one: each sees what those before it changed."""

    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for callback in callbacks:
            changed |= callback(pipe, step, timestep, tensors | changed) or {}
        return changed

    return call


def check_prompt(text: object) -> None:
    """UsageError unless it is a text that says something."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError("the prompt is empty; say what the new picture shows")


def check_seed(number: object) -> None:
    """UsageError unless it is a whole number that a generator takes."""
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
        raise UsageError(f"seed {number!r} is not a whole number from 0 to 2^63 - 1")


def check_options(options: dict[str, Any]) -> None:
    """UsageError for options of `Student.generate` that no model could take; None is always fine. Needs no model."""
    from diptych.data.formats import colour
    from diptych.student.settings import MAX_STEPS

    for name, value in options.items():
        if value is None:
            continue
        if name == "steps" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_STEPS):
            raise UsageError(f"steps {value!r} is not a whole number of at least 1 and at most {MAX_STEPS}")
        if name.endswith("guidance") and not (
            isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        ):
            raise UsageError(f"{name} {value!r} is not a number of at least 0")
        if name == "negative_prompt" and not isinstance(value, str):
            raise UsageError(f"a negative prompt is a text, not {type(value).__name__}")
        if name == "size":
            sides = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
            if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
                raise UsageError(f"size {value!r}: give pixels, one number or (width, height)")
        if name == "fit":
            from diptych.student.canvas import check_fit

            check_fit(str(value))
        if name == "background":
            colour(str(value))


def _check_device(device: str | torch.device | None) -> None:
    """UsageError for an accelerator that this machine does not have, before a model is read for it."""
    import torch

    from diptych.utils.machine import pick_device

    kind = pick_device(device).type
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind in there and not there[kind]():
        raise UsageError(
            f"device '{device}': this machine, or this installation of torch, has none; leave the device out"
        )


def _less(memory: object) -> str:
    """What needs less memory than a student with this preset."""
    return "--memory auto (in Python memory='auto')" if memory is None else "a smaller --memory"


@contextmanager
def _memory_said(doing: str, instead: str) -> Iterator[None]:
    """Says what to do when memory runs out."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(words in str(error) for words in ("can't allocate memory", "out of memory")):
            raise
        raise UserError(f"memory ran out {doing}; {instead}") from error


def _bytes(folder: Path) -> int:
    if folder.is_file():
        return folder.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _as_list(value: _T | Sequence[_T]) -> list[_T]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise UsageError("an empty list was given; give at least one reference, prompt and seed")
    return values  # pyright: ignore[reportReturnType]
