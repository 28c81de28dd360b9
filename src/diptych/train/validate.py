"""How a run is judged while it runs: the loss on held-out pairs at fixed noise, and a sheet of pictures.

The loss uses the same noise at every validation, so its curve moves only when the weights do. The sheet is drawn by the
inference pipeline itself, in its own precision, so that what it shows is what `generate` will draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from diptych.train.buckets import Bucket
from diptych.train.draws import fixed_noise
from diptych.train.latents import Latents, panels_of
from diptych.train.objective import Batch
from diptych.train.options import SIGMAS, Options
from diptych.train.text import Text

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def validation_loss(
    losses: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]],
    buckets: Sequence[Bucket],
    latents: Latents,
    text: Text,
    rows: Sequence[int],
    options: Options,
    device: torch.device,
) -> dict[str, Any]:
    """Mean loss of these rows at each level of `SIGMAS`, left and right apart, and `loss`, their weighted sum's mean.

    No dropout; `losses` is `objective.panel_losses` bound to the model.
    """
    sums = {side: dict.fromkeys(SIGMAS, 0.0) for side in ("left", "right")}
    for part in _batches(latents, rows, options.batch_size):
        clean, condition = latents.gather([row for row, _ in part])
        samples = [latents.samples[row] for row, _ in part]
        embeds, pooled = text.gather([sample.told(options.instructions == 1) for sample in samples])
        ids = [(sample.id, sigma) for sample, (_, sigma) in zip(samples, part, strict=True)]
        shape = latents.shape(part[0][0])
        noise = torch.stack([fixed_noise(options.seed, name, sigma, shape) for name, sigma in ids])
        sigmas = torch.tensor([sigma for _, sigma in part])
        batch = Batch(clean, condition, noise, sigmas, embeds, pooled, canvas=buckets[samples[0].bucket].canvas)
        for side, values in zip(sums, losses(batch.map(lambda tensor: tensor.to(device))), strict=True):
            for (_, level), value in zip(part, values.tolist(), strict=True):
                sums[side][level] += value
    means = {side: {str(s): total / len(rows) for s, total in by.items()} for side, by in sums.items()}
    left, right = (sum(means[side].values()) / len(SIGMAS) for side in ("left", "right"))
    return {"loss": options.left_weight * left + options.right_weight * right, **means}


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
    pipe: Any, buckets: Sequence[Bucket], latents: Latents, text: Text, rows: Sequence[int], options: Options
) -> Image:
    """One line for each row: reference | target | what the student draws for the target's caption.

    Reference and target are decoded from their latents. The reference goes to the pipeline as pixels, the caption as
    embeddings, the seed is the line's number: `generate` with the same three gives the same picture.
    """
    from PIL import Image

    device = pipe.transformer.device
    kinds = {p.dtype for p in pipe.transformer.parameters()}
    # A bfloat16 base with float32 adapters needs autocast to be run at all; any other model runs as it is.
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=len(kinds) > 1)
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
