"""How a run is judged while it runs: the loss on held-out pairs at fixed noise, and a sheet of pictures.

The loss uses the same noise at every validation, so its curve moves only when the weights do. The sheet is drawn by the
inference pipeline itself, in its own precision, so that what it shows is what `generate` will draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from diptych.train.cache import Latents, Text, panels_of
from diptych.train.objective import Batch
from diptych.train.processes import ALONE, Processes
from diptych.train.schedule import Bucket, fixed_noise

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.recipe.schema import Distill

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of the validation loss


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs: `rows` of the latents and text that training reads."""

    buckets: Sequence[Bucket]
    latents: Latents
    text: Text
    rows: Sequence[int]


@torch.no_grad()
def validation_loss(
    losses: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]],
    pairs: HeldOut,
    options: Distill,
    size: int,
    device: torch.device,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Mean loss of the pairs at each level of `SIGMAS`, left and right apart, and `loss`, their weighted sum's mean.

    No dropout. `losses` is `objective.panel_losses` bound to the model, and gets at most `size` samples at once. Each
    process computes its share of these batches; all return the same figures.
    """
    batches = _batches(pairs.latents, pairs.rows, size)
    work = [each for part in batches for each in part]
    values = torch.zeros(2, len(work), dtype=torch.float64)
    starts = [0, *accumulate(len(part) for part in batches)]
    for first in range(0, len(batches), processes.count):
        number = first + processes.rank
        # Spread weights are gathered by all at once: who has nothing left computes the last batch once more.
        part = batches[min(number, len(batches) - 1)]
        both = losses(_batch(pairs, part, options).map(lambda tensor: tensor.to(device)))
        if number < len(batches):
            values[:, starts[number] : starts[number + 1]] = torch.stack(both).to(values)
    sums = {side: dict.fromkeys(SIGMAS, 0.0) for side in ("left", "right")}
    for by_level, side in zip(sums.values(), processes.sum(values).tolist(), strict=True):
        for (_, level), value in zip(work, side, strict=True):
            by_level[level] += value
    means = {side: {str(s): total / len(pairs.rows) for s, total in by.items()} for side, by in sums.items()}
    left, right = (sum(means[side].values()) / len(SIGMAS) for side in ("left", "right"))
    return {"loss": options.left_weight * left + options.right_weight * right, **means}


def _batch(pairs: HeldOut, part: Sequence[tuple[int, float]], options: Distill) -> Batch:
    """Samples of (row, noise level), on the CPU."""
    latents = pairs.latents
    clean, condition = latents.gather([row for row, _ in part])
    samples = [latents.samples[row] for row, _ in part]
    embeds, pooled = pairs.text.gather([sample.told(options.instructions == 1) for sample in samples])
    ids = [(sample.id, sigma) for sample, (_, sigma) in zip(samples, part, strict=True)]
    shape = latents.shape(part[0][0])
    noise = torch.stack([fixed_noise(options.seed or 0, name, sigma, shape) for name, sigma in ids])
    sigmas = torch.tensor([sigma for _, sigma in part])
    canvas = pairs.buckets[samples[0].bucket].canvas
    return Batch(clean, condition, noise, sigmas, embeds, pooled, canvas=canvas)


def _batches(latents: Latents, rows: Sequence[int], size: int) -> list[list[tuple[int, float]]]:
    """(row, noise level) of all these rows at all levels, in batches that are of one bucket each."""
    found: list[list[tuple[int, float]]] = []
    for bucket in sorted({latents.samples[row].bucket for row in rows}):
        own = [row for row in rows if latents.samples[row].bucket == bucket]
        work = [(row, sigma) for sigma in SIGMAS for row in own]
        found += [work[first : first + size] for first in range(0, len(work), size)]
    return found


@torch.no_grad()
def sample_sheet(
    pipe: Any, buckets: Sequence[Bucket], latents: Latents, text: Text, rows: Sequence[int], options: Distill
) -> Image:
    """One line for each row: reference | target | what the student draws for the target's caption.

    Reference and target are decoded from their latents. The reference goes to the pipeline as pixels, the caption as
    embeddings, the seed is the line's number: `generate` with the same three gives the same picture.
    """
    from PIL import Image

    device = pipe.transformer.device
    kinds = {p.dtype for p in pipe.transformer.parameters()}
    # A bfloat16 base with float32 adapters needs autocast to be run at all; any other model runs as it is.
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=len(kinds) > 1, cache_enabled=False)
    dtype = torch.bfloat16 if len(kinds) > 1 else next(iter(kinds))
    canvases = [buckets[latents.samples[row].bucket].canvas for row in rows]
    size = 3 * max(canvas.panel_width for canvas in canvases), sum(canvas.panel_height for canvas in canvases)
    sheet, top = Image.new("RGB", size), 0
    for line, (row, canvas) in enumerate(zip(rows, canvases, strict=True)):
        pixels = torch.cat(panels_of(pipe, latents, [row], canvas))
        reference, target = pipe.image_processor.postprocess(pixels, output_type="pil")
        embeds, pooled = text.gather([latents.samples[row].told(options.instructions == 1)])
        with mixed:
            (drawn,) = pipe(
                reference=reference,
                prompt_embeds=embeds.to(device, dtype),
                pooled_prompt_embeds=pooled.to(device, dtype),
                height=canvas.panel_height,
                width=canvas.panel_width,
                num_inference_steps=options.sample_steps,
                guidance_scale=options.sample_guidance,
                image_guidance_scale=1.0,
                text_guidance_scale=1.0,
                generator=line,
            ).images
        for column, panel in enumerate((reference, target, drawn)):
            sheet.paste(panel, (column * canvas.panel_width, top))
        top += canvas.panel_height
    return sheet
