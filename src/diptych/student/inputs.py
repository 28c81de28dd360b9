"""Inputs of a call of the pipeline, checked and matched: a text, a reference and a seed for every image."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image

from diptych.errors import UsageError, nearest
from diptych.student.canvas import Canvas, check_panel_size, condition_canvas, fit_image, kept_size, to_pixels
from diptych.student.families.base import Family, Text, Texts, join
from diptych.student.families.flux1 import Layout
from diptych.student.references import References, TokenStyle
from diptych.student.runtime.applied import Runtime
from diptych.student.runtime.caches import content

if TYPE_CHECKING:
    from diptych.student.reference_pipeline import ReferencePipeline

Reference = Image.Image | torch.Tensor | None
Seed = int | torch.Generator
OUTPUTS = ("pil", "np", "pt", "latent")
# Arguments of diffusers' other pipelines, and what to use instead.
ELSEWHERE = {
    "control_image": "is the complete canvas of stock FLUX-Control. Pass the reference as image.",
    "true_cfg_scale": "is called text_guidance_scale here, beside image_guidance_scale.",
    "ip_adapter_image": "needs an adapter. Pass the reference as image.",
    "max_area": "is for models that choose their size. Pass one panel's height and width.",
    "strength": "is for pipelines that start from an image. Pass the reference as image.",
}


def refuse(unknown: Iterable[str], function: Callable[..., object]) -> None:
    """UsageError for arguments that a function does not have."""
    for name in unknown:
        hint = nearest(name, inspect.signature(function).parameters)
        reason = ELSEWHERE.get(name) or f"is not an argument of this pipeline{hint}"
        raise UsageError("option_unsuited", f"{name} {reason}")


def check(output_type: str, steps: int, repeats: int, shown: Sequence[str], can_be_shown: Sequence[str]) -> None:
    """UsageError for an unknown output type, for counts below 1, and for tensors that callbacks cannot get."""
    if output_type not in OUTPUTS:
        raise UsageError("name_unknown", f"Unknown output_type '{output_type}'. Use one of {', '.join(OUTPUTS)}.")
    if steps < 1 or repeats < 1:
        raise UsageError("option_invalid", "num_inference_steps and num_images_per_prompt must be at least 1.")
    if others := sorted(set(shown) - set(can_be_shown)):
        raise UsageError("name_unknown", f"Callbacks cannot get {others}. Use names of {list(can_be_shown)}.")


def _wrong_type(name: str, wanted: str, value: object) -> UsageError:
    return UsageError("argument_type", f"{name} must be {wanted}, not {type(value).__name__}.")


def texts(value: str | Sequence[str] | None, count: int) -> list[str] | None:
    """One text for each of `count` rows."""
    if value is None:
        return None
    if not isinstance(value, (str, list, tuple)) or not all(isinstance(text, str) for text in value):
        raise _wrong_type("A prompt", "a string or a list of strings", value)
    listed = [value] if isinstance(value, str) else list(value)
    if len(listed) not in (1, count):
        raise UsageError(
            "count_mismatch", f"{len(listed)} texts for {count} images. Pass one text, or one for each image."
        )
    return listed * count if len(listed) == 1 else listed


def match(
    prompt: str | Sequence[str] | None, prompt_embeds: torch.Tensor | None, reference: Reference | Sequence[Reference]
) -> tuple[list[str] | None, list[Reference]]:
    """Prompts and references, one of each for every row of the batch."""
    if prompt is not None and not isinstance(prompt, (str, list, tuple)):
        raise _wrong_type("prompt", "a string or a list of strings", prompt)
    if isinstance(reference, torch.Tensor) and reference.ndim == 4:
        reference = [*reference]
    references: list[Reference] = list(reference) if isinstance(reference, (list, tuple)) else [reference]  # pyright: ignore
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if prompt is not None else None
    rows = len(prompts) if prompts is not None else len(prompt_embeds) if prompt_embeds is not None else 0
    if not rows:
        raise UsageError("option_missing", "Pass prompt or prompt_embeds.")
    count = max(rows, len(references))
    if {rows, len(references)} - {1, count}:
        raise UsageError(
            "count_mismatch",
            f"{rows} prompts and {len(references)} references. Pass one of either, or equal numbers of both.",
        )
    if prompts is not None and len(prompts) == 1:
        prompts = prompts * count
    return prompts, references * count if len(references) == 1 else references


def one_of(image: PipelineImageInput | None, reference: Reference | Sequence[Reference | Sequence[Reference]]) -> Any:
    """The references, from `reference` or from diffusers' `image`: PIL images, arrays (h, w, 3) and tensors (3, h, w)
    with values from 0 to 1, a list or a batch of these."""
    if image is None:
        return reference
    if reference is not None:
        raise UsageError("option_conflict", "image and reference are two names of the reference. Pass one of them.")
    references: list[Any] = []
    for each in image if isinstance(image, (list, tuple)) else [image]:
        if not isinstance(each, (np.ndarray, torch.Tensor)):
            references.append(each)
        elif each.min() < 0 or each.max() > 1:
            raise UsageError("argument_type", "Arrays and tensors passed as image must have values from 0 to 1.")
        elif isinstance(each, torch.Tensor):
            references += VaeImageProcessor.numpy_to_pil(
                VaeImageProcessor.pt_to_numpy(each if each.ndim == 4 else each[None])
            )
        else:
            references += VaeImageProcessor.numpy_to_pil(each)
    return references


def seeds(generator: Seed | Sequence[Seed] | None, count: int, repeats: int) -> list[Seed | None]:
    """One seed or generator for each image."""
    total = count * repeats
    if isinstance(generator, (list, tuple)):
        if len(generator) != total:
            raise UsageError(
                "count_mismatch", f"{len(generator)} generators for {total} images. Pass one, or one for each image."
            )
        return list(generator)
    if isinstance(generator, int) and not isinstance(generator, bool):
        return [generator + j for _ in range(count) for j in range(repeats)]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise _wrong_type("generator", "a seed, a torch.Generator or a list of these", generator)
    return [generator] * total


def panel(reference: Reference, canvas: Canvas, fit: str) -> torch.Tensor:
    """A reference as one panel of pixels (1, 3, h, w) in [-1, 1]."""
    if isinstance(reference, Image.Image):
        return to_pixels(fit_image(reference, canvas.panel_height, canvas.panel_width, fit))[None]
    if isinstance(reference, torch.Tensor):
        return _checked(reference, (3, canvas.panel_height, canvas.panel_width))
    raise _wrong_type("A reference", "a PIL image, a tensor or None", reference)


def _checked(reference: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A reference tensor as a batch of one. UsageError if it has another shape."""
    if tuple(reference.shape) != shape:
        raise UsageError(
            "argument_type",
            f"A reference tensor must have shape {shape} and values in [-1, 1], not shape {tuple(reference.shape)}.",
        )
    return reference[None]


def reference_pixels(reference: Reference, canvas: Canvas, fit: str) -> torch.Tensor:
    """A reference of tokens conditioning as pixels (1, 3, h, w) in [-1, 1]. An image is fitted to the panel or, with
    fit `keep`, to about the panel's area at its aspect ratio. A tensor may have any size."""
    if isinstance(reference, Image.Image):
        size = kept_size(reference, canvas) if fit == "keep" else (canvas.panel_height, canvas.panel_width)
        return to_pixels(fit_image(reference, *size, "crop" if fit == "keep" else fit))[None]
    if not isinstance(reference, torch.Tensor):
        raise _wrong_type("A reference", "a PIL image, a tensor or None", reference)
    batch = _checked(reference, (3, *reference.shape[-2:]))
    height, width = reference.shape[1:]
    check_panel_size(height, width, canvas.factor)
    return batch


def conditions(
    pipe: ReferencePipeline, references: Sequence[Reference | Sequence[Reference]], canvas: Canvas, fit: str
) -> torch.Tensor | References:
    """The condition of a batch: [reference | black] encoded jointly, (B, tokens, 4C), with zeros for a reference of
    None; or, for tokens conditioning, `References`, of which a row may have several.

    Each distinct image is encoded once and separately, so that a batch gives the same bits as single calls.
    """
    if pipe.conditioning == "tokens":
        return _clean(pipe, references, canvas, fit)
    null = torch.zeros(1, canvas.tokens, pipe.channels, device=pipe._execution_device)
    known: dict[int, torch.Tensor] = {}
    for reference in references:
        if isinstance(reference, (list, tuple)):
            raise UsageError(
                "option_unsuited",
                f"A student of {pipe.conditioning} conditioning has one reference for each image. Several references "
                "need a student of tokens conditioning.",
            )
        if reference is None:
            known[id(reference)] = null
        elif id(reference) not in known:
            pixels = condition_canvas(panel(reference, canvas, fit), canvas.panels)  # pyright: ignore[reportArgumentType]
            known[id(reference)] = _encoded(pipe, pixels)
    return torch.cat([known[id(reference)].float() for reference in references])


def _clean(
    pipe: ReferencePipeline, references: Sequence[Reference | Sequence[Reference]], canvas: Canvas, fit: str
) -> References:
    settings, unit = pipe.settings, 2 * canvas.factor
    known: dict[tuple[int, ...], tuple[torch.Tensor, Layout]] = {}
    rows = []
    for row in references:
        images = list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
        if row is not None and not images:
            raise UsageError(
                "count_mismatch", "A list of references is empty. Pass None for an image without a reference."
            )
        key = tuple(map(id, images))
        if key not in known:
            pixels = [reference_pixels(image, canvas, fit) for image in images]  # pyright: ignore[reportArgumentType]
            parts = [_encoded(pipe, each).float() for each in pixels]
            layout = tuple((each.shape[-2] // unit, each.shape[-1] // unit) for each in pixels)
            empty = torch.zeros(1, 0, pipe.channels, device=pipe._execution_device)
            known[key] = torch.cat([*parts, empty], dim=1)[0], layout
        rows.append(known[key])
    style = TokenStyle(settings.positions, settings.reference_attention)
    return References([tokens for tokens, _ in rows], [layout for _, layout in rows], style)


def _encoded(pipe: ReferencePipeline, pixels: torch.Tensor) -> torch.Tensor:
    """Packed latents of pixels (1, 3, H, W), cached between calls if the speed setting has `remember`."""
    recall = pipe.runtime.recall
    if not recall.limit:
        return pipe.encode_canvas(pixels)
    key = ("reference", content(pixels), id(pipe.vae), pipe.vae.dtype, str(pipe._execution_device))
    return recall(key, lambda: (pipe.encode_canvas(pixels),))[0]


# Text embeddings -----------------------------------------------------------------------------------------------------


def embedded(
    encode: Callable[[list[str], list[str] | None], Texts],
    what: str,
    texts_1: list[str] | None,
    texts_2: list[str] | None,
    given: Text,
    family: Family,
    count: int,
    device: torch.device,
) -> Texts:
    """The tensors of a family's text, each with `count` rows: those passed as `given`, or those that `encode` makes of
    texts."""
    embeds, pooled, mask = given.embeds, given.pooled, given.mask
    if embeds is None:
        if texts_1 is None:
            raise UsageError("option_missing", f"Pass {what} or {what}_embeds.")
        return tuple(tensor.to(device) for tensor in encode(texts_1, texts_2))
    if texts_1 is not None or texts_2 is not None:
        raise UsageError("option_conflict", f"Pass {what} or {what}_embeds, not both.")
    if pooled is None and "pooled" in family.texts:
        name = "negative_pooled_prompt_embeds" if what.startswith("negative") else "pooled_prompt_embeds"
        raise UsageError("option_missing", f"{what}_embeds needs {name} of the same text.")
    values = {"embeds": embeds, "pooled": pooled, "mask": torch.ones(embeds.shape[:2]) if mask is None else mask}
    values["mask"] = values["mask"].bool()
    rows = [values[name].to(device) for name in family.texts]
    if {len(each) for each in rows} - {1, count}:
        counts = " and ".join(
            f"{len(each)} {'' if name == 'embeds' else f'{name} '}{'masks' if name == 'mask' else 'embeddings'}"
            for name, each in zip(family.texts, rows, strict=True)
        )
        raise UsageError("count_mismatch", f"{what}: {counts} for {count} images.")
    return tuple(each.expand(count, *each.shape[1:]) for each in rows)


def encode(pipe: Any, runtime: Runtime, prompt: list[str], prompt_2: list[str] | None, length: int) -> Texts:
    """The tensors of prompts from the pipeline's text encoders, or from the cache."""

    def encoded(first: list[str], second: list[str] | None) -> Texts:
        runtime.stage("text")
        with _quiet_truncation():
            if second is None:
                return pipe.family.embed(pipe, first, length).tensors
            embeds, pooled, _ = pipe.encode_prompt(first, second, max_sequence_length=length)
            return embeds, pooled

    cache = runtime.texts
    if cache is None:
        return encoded(prompt, prompt_2)
    # Each text separately, so that an embedding does not depend on the other texts.
    # A memory preset loads its text encoders again; otherwise another object is another encoder.
    encoders = None if runtime.memory is not None else tuple(id(getattr(pipe, part)) for part in pipe.text_parts)
    rows = []
    for first, second in zip(prompt, prompt_2 or [None] * len(prompt), strict=True):
        key = ("text", first, second, length, encoders, str(pipe._execution_device))
        rows.append(cache(key, partial(encoded, [first], [second] if second is not None else None)))
    return tuple(tensor.to(pipe._execution_device) for tensor in join(rows))


@contextmanager
def _quiet_truncation() -> Iterator[None]:
    """Suppresses diffusers' truncation messages, which come at every call and name the wrong part of the text."""
    logger = logging.getLogger("diffusers.pipelines.flux.pipeline_flux_control")

    def quiet(record: logging.LogRecord) -> bool:
        return "was truncated" not in record.getMessage()

    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
