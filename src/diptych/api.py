"""`Student`: the one object most people need. A model by name or folder, and pictures from references and prompts.

    from diptych import Student
    student = Student.load("pocket")
    student.generate(reference, "a cat on a beach at sunset", seed=0).save("cat.png")

Everything below it is `diptych.student`; what diffusers can do to a pipeline (offload, compile, caches, LoRA) is done
on `student.pipeline`.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diptych.errors import UsageError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diptych.student.loading import Loras
    from diptych.student.pipeline import DiptychPipeline

    Reference = Image.Image | str | Path | None

log = logging.getLogger("diptych.api")
HASHED_BYTES = 2 * 2**30  # larger models are named but not hashed: FLUX would take minutes before its first picture
_T = TypeVar("_T")


class Student:
    """A student that is loaded and ready. `pipeline` is the diffusers pipeline inside."""

    def __init__(
        self,
        pipeline: DiptychPipeline,
        name: str = "",
        *,
        words: frozenset[str] | None = None,
        sampling: dict[str, float] | None = None,
    ) -> None:
        from diptych.student.loading import SAMPLING

        self.pipeline = pipeline
        self.name = name
        self.sampling = sampling or dict(SAMPLING)  # the model's own settings, for what `generate` is not told
        self.words = words  # what a small model can read; None: no such limit
        self._said: set[str] = set()

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
    ) -> Student:
        """Opens `pocket`, a folder, or a hub name; the arguments are those of `diptych.student.load`.

        LoRAs are fused by default: the picture is the same to float rounding, and drawn faster.
        Raises UserError, UsageError: one line that says what is missing, damaged or unknown, and what to do.
        """
        from diptych.student import load
        from diptych.student.loading import read_sampling, read_words

        pipeline = load(model, base, device=device, dtype=dtype, lora=lora, released_lora=released_lora, fuse=fuse)
        return cls(pipeline, str(model), words=read_words(pipeline), sampling=read_sampling(pipeline))

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
        negative_prompt: str | None = None,
        size: int | tuple[int, int] | None = None,
        fit: str = "crop",
        batch_size: int = 1,
    ) -> Any:
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
                None, for each of these four: the model's own setting (`sampling.json` in its folder), else the
                released code's (28, 3.5, 1, 1).
            size: side of the square picture, or (width, height), in pixels; default the model's own.
            fit: how the reference meets that size: crop, pad or contain.
            batch_size: pictures drawn together.

        Returns:
            An RGB image, or a list of them; `image.info` says what made each (model, prompt, seed, options, versions).

        Raises:
            UsageError for arguments that do not fit, UserError for a reference that cannot be read.
        """
        listed = [isinstance(x, (list, tuple)) for x in (reference, prompt, seed)]
        references = [self._open(r) for r in _as_list(reference)]
        prompts, seeds = _as_list(prompt), _as_list(seed)
        width, height = self._size(size)
        if batch_size < 1:
            raise UsageError(f"batch_size is at least 1, not {batch_size}")
        for text in prompts:
            if not isinstance(text, str) or not text.strip():
                raise UsageError("the prompt is empty; say what the new picture shows")
            self._warn_of_words(text)
        for number in seeds:
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
                raise UsageError(f"seed {number!r} is not a whole number from 0 to 2^63 - 1")
        asked = {"steps": steps, "guidance": guidance, "image_guidance": image_guidance, "text_guidance": text_guidance}
        sampling = self.sampling | {key: value for key, value in asked.items() if value is not None}
        settings = {**sampling, "negative_prompt": negative_prompt, "fit": fit}
        images: list[Image.Image] = []
        # One PIL object per reference, so that the pipeline can tell a repeated one.
        jobs = list(itertools.product(references, prompts, seeds))
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            drawn = self.pipeline(
                # A model with a word list was taught lower-case words alone.
                prompt=[text if self.words is None else text.lower() for _, text, _ in batch],
                reference=[picture for picture, _, _ in batch],
                generator=[number for _, _, number in batch],
                height=height,
                width=width,
                num_inference_steps=int(sampling["steps"]),
                guidance_scale=sampling["guidance"],
                image_guidance_scale=sampling["image_guidance"],
                text_guidance_scale=sampling["text_guidance"],
                negative_prompt=negative_prompt,
                fit=fit,
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
            log.warning("the model does not know %s; the picture will not show it", ", ".join(map(repr, unknown)))

    def _open(self, reference: Reference) -> Image.Image | None:
        from PIL import Image

        if reference is None or isinstance(reference, Image.Image):
            return reference
        if not isinstance(reference, (str, Path)):
            raise UsageError(f"a reference is a PIL image, an image file or None, not {type(reference).__name__}")
        from diptych.data.images import open_image

        return open_image(reference)

    def _size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            size = self.pipeline.default_panel_size
        width, height = (size, size) if isinstance(size, int) else size
        return width, height

    def _provenance(self, image: Image.Image) -> dict[str, Any]:
        import diffusers
        import torch

        from diptych import __version__
        from diptych.models import fingerprint

        folders = [fingerprint(f) if _bytes(f) <= HASHED_BYTES else None for f in self.pipeline.loaded_from]
        return {
            "model": self.name,
            "fingerprints": folders,
            "width": image.width,
            "height": image.height,
            "dtype": str(self.pipeline.transformer.dtype).removeprefix("torch."),
            "device": self.pipeline.device.type,
            "versions": {"diptych": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
        }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _as_list(value: _T | Sequence[_T]) -> list[_T]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise UsageError("an empty list was given; give at least one reference, prompt and seed")
    return values  # pyright: ignore[reportReturnType]
