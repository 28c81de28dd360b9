"""What a call of the pipeline was given, matched up: a text, a reference and a seed for every row of the batch."""

from __future__ import annotations

import torch
from PIL import Image

from diptych.errors import UsageError
from diptych.student.canvas import Canvas, fit_image, to_pixels

Reference = Image.Image | torch.Tensor | None
Seed = int | torch.Generator


def texts(value: str | list[str] | None, count: int) -> list[str] | None:
    """One text for each of `count` rows."""
    if value is None:
        return None
    if not isinstance(value, (str, list, tuple)) or not all(isinstance(text, str) for text in value):
        raise UsageError(f"a prompt is a string or a list of strings, not {type(value).__name__}")
    found = [value] if isinstance(value, str) else list(value)
    if len(found) not in (1, count):
        raise UsageError(f"{len(found)} texts for {count} images")
    return found * count if len(found) == 1 else found


def match(prompt, prompt_embeds, reference) -> tuple[list[str] | None, list[Reference]]:
    """Prompts and references, one of each for every row of the batch."""
    if prompt is not None and not isinstance(prompt, (str, list, tuple)):
        raise UsageError(f"prompt is a string or a list of strings, not {type(prompt).__name__}")
    if isinstance(reference, torch.Tensor) and reference.ndim == 4:
        reference = [*reference]
    references: list[Reference] = list(reference) if isinstance(reference, (list, tuple)) else [reference]
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


def seeds(generator, count: int, repeats: int) -> list[Seed | None]:
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
