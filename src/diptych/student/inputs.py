"""What a call of the pipeline is given, checked and matched up: a text, a reference and a seed for every image."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import FluxControlPipeline
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image

from diptych.errors import UsageError, nearest
from diptych.student.canvas import Canvas, check_panel_size, condition_canvas, fit_image, kept_size, to_pixels
from diptych.student.references import Layout, References, TokenStyle
from diptych.student.runtime.applied import Runtime
from diptych.student.runtime.caches import content
from diptych.student.sampler import Text

if TYPE_CHECKING:
    from diptych.student.pipeline import DiptychPipeline

Reference = Image.Image | torch.Tensor | None
Seed = int | torch.Generator
OUTPUTS = ("pil", "np", "pt", "latent")
# Arguments of diffusers' other pipelines, and what stands for them here.
ELSEWHERE = {
    "control_image": "is stock FLUX-Control's whole canvas; give the reference alone, as image",
    "true_cfg_scale": "is text_guidance_scale here, beside image_guidance_scale",
    "ip_adapter_image": "needs an adapter; give the reference as image",
    "max_area": "is for models that choose their size; give one panel's height and width",
    "strength": "is for pipelines that start from an image; give the reference as image",
}


def refuse(unknown: Iterable[str], function: Callable[..., Any]) -> None:
    """UsageError for arguments that a function does not have."""
    for name in unknown:
        known = inspect.signature(function).parameters
        raise UsageError(f"{name} {ELSEWHERE.get(name) or f'is no argument of this pipeline{nearest(name, known)}'}")


def check(output_type: str, steps: int, repeats: int, shown: Sequence[str], can_be_shown: Sequence[str]) -> None:
    """UsageError for an unknown output type, for counts below 1, and for tensors that no callback is given."""
    if output_type not in OUTPUTS:
        raise UsageError(f"unknown output_type '{output_type}': one of {', '.join(OUTPUTS)}")
    if steps < 1 or repeats < 1:
        raise UsageError("num_inference_steps and num_images_per_prompt are at least 1")
    if others := sorted(set(shown) - set(can_be_shown)):
        raise UsageError(f"callbacks can be given {list(can_be_shown)}, not {others}")


def texts(value: str | Sequence[str] | None, count: int) -> list[str] | None:
    """One text for each of `count` rows."""
    if value is None:
        return None
    if not isinstance(value, (str, list, tuple)) or not all(isinstance(text, str) for text in value):
        raise UsageError(f"a prompt is a string or a list of strings, not {type(value).__name__}")
    found = [value] if isinstance(value, str) else list(value)
    if len(found) not in (1, count):
        raise UsageError(f"{len(found)} texts for {count} images")
    return found * count if len(found) == 1 else found


def match(
    prompt: str | Sequence[str] | None, prompt_embeds: torch.Tensor | None, reference: Reference | Sequence[Reference]
) -> tuple[list[str] | None, list[Reference]]:
    """Prompts and references, one of each for every row of the batch."""
    if prompt is not None and not isinstance(prompt, (str, list, tuple)):
        raise UsageError(f"prompt is a string or a list of strings, not {type(prompt).__name__}")
    if isinstance(reference, torch.Tensor) and reference.ndim == 4:
        reference = [*reference]
    references: list[Reference] = list(reference) if isinstance(reference, (list, tuple)) else [reference]  # pyright: ignore
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if prompt is not None else None
    rows = len(prompts) if prompts is not None else len(prompt_embeds) if prompt_embeds is not None else 0
    if not rows:
        raise UsageError("give prompt or prompt_embeds (at least one)")
    count = max(rows, len(references))
    if {rows, len(references)} - {1, count}:
        raise UsageError(f"{rows} prompts and {len(references)} references: give one of either, or as many of both")
    if prompts is not None and len(prompts) == 1:
        prompts = prompts * count
    return prompts, references * count if len(references) == 1 else references


def one_of(image: PipelineImageInput | None, reference: Reference | Sequence[Reference]) -> Any:
    """The references, by our name or by diffusers' `image`: PIL images, arrays (h, w, 3) and tensors (3, h, w) with
    values from 0 to 1, a list or a batch of these."""
    if image is None:
        return reference
    if reference is not None:
        raise UsageError("give image or reference, not both: they are two names for the reference image")
    found: list[Any] = []
    for each in image if isinstance(image, (list, tuple)) else [image]:
        if not isinstance(each, (np.ndarray, torch.Tensor)):
            found.append(each)
        elif each.min() < 0 or each.max() > 1:
            raise UsageError("arrays and tensors given as image hold values from 0 to 1")
        elif isinstance(each, torch.Tensor):
            found += VaeImageProcessor.numpy_to_pil(
                VaeImageProcessor.pt_to_numpy(each if each.ndim == 4 else each[None])
            )
        else:
            found += VaeImageProcessor.numpy_to_pil(each)
    return found


def seeds(generator: Seed | Sequence[Seed] | None, count: int, repeats: int) -> list[Seed | None]:
    """One seed or generator for each image."""
    total = count * repeats
    if isinstance(generator, (list, tuple)):
        if len(generator) != total:
            raise UsageError(f"{len(generator)} generators for {total} images: give one, or one for each image")
        return list(generator)
    if isinstance(generator, int) and not isinstance(generator, bool):
        return [generator + j for _ in range(count) for j in range(repeats)]
    if generator is not None and not isinstance(generator, torch.Generator):
        raise UsageError(f"generator is a seed, a torch.Generator or a list of them, not {type(generator).__name__}")
    return [generator] * total


def panel(reference: Reference, canvas: Canvas, fit: str) -> torch.Tensor:
    """A reference as one panel of pixels (1, 3, h, w) in [-1, 1]."""
    if isinstance(reference, Image.Image):
        return to_pixels(fit_image(reference, canvas.panel_height, canvas.panel_width, fit))[None]
    if isinstance(reference, torch.Tensor):
        wanted = (3, canvas.panel_height, canvas.panel_width)
        if tuple(reference.shape) != wanted:
            raise UsageError(f"a reference tensor is {wanted} here (a panel in [-1, 1]), not {tuple(reference.shape)}")
        return reference[None]
    raise UsageError(f"a reference is a PIL image, a tensor or None, not {type(reference).__name__}")


def reference_pixels(reference: Reference, canvas: Canvas, fit: str) -> torch.Tensor:
    """A reference of tokens conditioning as pixels (1, 3, h, w) in [-1, 1]: an image fitted to the panel or, with fit
    `keep`, at its own aspect ratio and about the panel's area; a tensor as it is."""
    if isinstance(reference, Image.Image):
        size = kept_size(reference, canvas) if fit == "keep" else (canvas.panel_height, canvas.panel_width)
        return to_pixels(fit_image(reference, *size, "crop" if fit == "keep" else fit))[None]
    if not isinstance(reference, torch.Tensor):
        raise UsageError(
            "argument_type", f"a reference is a PIL image, a tensor or None, not {type(reference).__name__}"
        )
    if reference.ndim != 3 or len(reference) != 3:
        raise UsageError(
            "argument_type", f"a reference tensor is (3, height, width) in [-1, 1], not {tuple(reference.shape)}"
        )
    check_panel_size(*reference.shape[1:], canvas.factor)
    return reference[None]


def conditions(
    pipe: DiptychPipeline, references: Sequence[Reference | Sequence[Reference]], canvas: Canvas, fit: str
) -> torch.Tensor | References:
    """The condition of a batch: [reference | black] encoded jointly, (B, tokens, 4C), zeros for a reference of None; or
    `References`, of which a row may have several.

    Encoded one at a time, each distinct image once, so that a batch gives the bits of the single calls.
    """
    if pipe.conditioning == "tokens":
        return _clean(pipe, references, canvas, fit)
    null = torch.zeros(1, canvas.tokens, pipe.channels, device=pipe._execution_device)
    known: dict[int, torch.Tensor] = {}
    for reference in references:
        if isinstance(reference, (list, tuple)):
            raise UsageError(
                "option_unsuited",
                f"this student takes one reference an image ({pipe.conditioning} conditioning); several need a student "
                "of tokens conditioning",
            )
        if id(reference) not in known:
            known[id(reference)] = null if reference is None else _condition(pipe, reference, canvas, fit)
    return torch.cat([known[id(reference)].float() for reference in references])


def _condition(pipe: DiptychPipeline, reference: Reference, canvas: Canvas, fit: str) -> torch.Tensor:
    return _encoded(pipe, condition_canvas(panel(reference, canvas, fit), canvas.panels))


def _clean(
    pipe: DiptychPipeline, references: Sequence[Reference | Sequence[Reference]], canvas: Canvas, fit: str
) -> References:
    settings, unit = pipe.settings, 2 * canvas.factor
    known: dict[tuple[int, ...], tuple[torch.Tensor, Layout]] = {}
    rows = []
    for row in references:
        images = list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
        if row is not None and not images:
            raise UsageError(
                "count_mismatch", "an empty list of references was given; give None for an image without one"
            )
        key = tuple(map(id, images))
        if key not in known:
            pixels = [reference_pixels(image, canvas, fit) for image in images]
            parts = [_encoded(pipe, each).float() for each in pixels]
            layout = tuple((each.shape[-2] // unit, each.shape[-1] // unit) for each in pixels)
            empty = torch.zeros(1, 0, pipe.channels, device=pipe._execution_device)
            known[key] = torch.cat([*parts, empty], dim=1)[0], layout
        rows.append(known[key])
    style = TokenStyle(settings.positions, settings.reference_attention)
    return References([tokens for tokens, _ in rows], [layout for _, layout in rows], style)


def _encoded(pipe: DiptychPipeline, pixels: torch.Tensor) -> torch.Tensor:
    """Packed latents of pixels (1, 3, H, W), remembered between calls if the speed setting says so."""
    recall = pipe.runtime.recall
    if not recall.limit:
        return pipe.encode_canvas(pixels)
    key = ("reference", content(pixels), id(pipe.vae), pipe.vae.dtype, str(pipe._execution_device))
    return recall(key, lambda: (pipe.encode_canvas(pixels),))[0]


# Texts, embedded -----------------------------------------------------------------------------------------------------


def embedded(
    encode: Callable[[list[str], list[str] | None], Text],
    what: str,
    texts_1: list[str] | None,
    texts_2: list[str] | None,
    embeds: torch.Tensor | None,
    pooled: torch.Tensor | None,
    count: int,
    device: torch.device,
) -> Text:
    """Embeddings (count, L, D) and (count, P), which `encode` makes of texts, or which are given themselves."""
    if embeds is None:
        if texts_1 is None:
            raise UsageError(f"give {what} or {what}_embeds")
        embeds, pooled = encode(texts_1, texts_2)
    elif texts_1 is not None or texts_2 is not None:
        raise UsageError(f"give {what} or {what}_embeds, not both")
    elif pooled is None:
        name = "negative_pooled_prompt_embeds" if what.startswith("negative") else "pooled_prompt_embeds"
        raise UsageError(f"{what}_embeds need {name} from the same text")
    embeds, pooled = embeds.to(device), pooled.to(device)
    if {len(embeds), len(pooled)} - {1, count}:
        raise UsageError(f"{what}: {len(embeds)} embeddings and {len(pooled)} pooled ones for {count} images")
    return embeds.expand(count, -1, -1), pooled.expand(count, -1)


def encode(
    pipe: FluxControlPipeline, runtime: Runtime, prompt: list[str], prompt_2: list[str] | None, length: int
) -> Text:
    """What the pipeline's text encoders make of prompts, or made of them before."""

    def made(first: list[str], second: list[str] | None) -> Text:
        runtime.stage("text")
        with _quiet_truncation():
            embeds, pooled, _ = pipe.encode_prompt(first, second, max_sequence_length=length)  # pyright: ignore
        assert embeds is not None and pooled is not None
        return embeds, pooled

    kept = runtime.texts
    if kept is None:
        return made(prompt, prompt_2)
    # Each text alone, so that an embedding does not depend on which others were encoded with it.
    # A memory preset opens its text encoders again; otherwise another object is another encoder.
    own = None if runtime.memory is not None else (id(pipe.text_encoder), id(pipe.text_encoder_2))
    rows = []
    for first, second in zip(prompt, prompt_2 or [None] * len(prompt), strict=True):
        key = ("text", first, second, length, own, str(pipe._execution_device))
        rows.append(kept(key, partial(made, [first], [second] if second is not None else None)))
    embeds, pooled = (torch.cat(parts).to(pipe._execution_device) for parts in zip(*rows, strict=True))
    return embeds, pooled


@contextmanager
def _quiet_truncation() -> Iterator[None]:
    """Holds back diffusers' own truncation messages: they come at every call, and name the wrong part of the text."""
    logger = logging.getLogger("diffusers.pipelines.flux.pipeline_flux_control")

    def quiet(record: logging.LogRecord) -> bool:
        return "was truncated" not in record.getMessage()

    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
