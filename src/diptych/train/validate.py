"""How a run is judged while it runs: the loss on held-out pairs at fixed noise, and a sheet of pictures.

The loss uses the same noise at every validation, so its curve moves only when the weights do. The sheet is drawn by the
inference pipeline itself, in its own precision, so that what it shows is what `generate` will draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from diptych.train.draws import fixed_noise
from diptych.train.latents import Latents
from diptych.train.objective import Batch
from diptych.train.options import SIGMAS, Options
from diptych.train.text import Text

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.student.geometry import Canvas


@torch.no_grad()
def validation_loss(
    losses: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]],
    latents: Latents,
    text: Text,
    rows: Sequence[int],
    options: Options,
    device: torch.device,
) -> dict[str, Any]:
    """Mean loss of these rows at each level of `SIGMAS`, left and right apart, and `loss`, their weighted sum's mean.

    No dropout; `losses` is `objective.panel_losses` bound to the model.
    """
    work = [(row, sigma) for sigma in SIGMAS for row in rows]
    sums = {side: dict.fromkeys(SIGMAS, 0.0) for side in ("left", "right")}
    for first in range(0, len(work), options.batch_size):
        part = work[first : first + options.batch_size]
        clean, condition = latents.gather([row for row, _ in part])
        samples = [latents.samples[row] for row, _ in part]
        embeds, pooled = text.gather([sample.told(options.instructions == 1) for sample in samples])
        ids = [(sample.id, sigma) for sample, (_, sigma) in zip(samples, part, strict=True)]
        noise = torch.stack([fixed_noise(options.seed, name, sigma, latents.shape) for name, sigma in ids])
        tensors = (clean, condition, noise, torch.tensor([sigma for _, sigma in part]), embeds, pooled)
        for side, values in zip(sums, losses(Batch(*(t.to(device) for t in tensors))), strict=True):
            for (_, level), value in zip(part, values.tolist(), strict=True):
                sums[side][level] += value
    means = {side: {str(s): total / len(rows) for s, total in by.items()} for side, by in sums.items()}
    left, right = (sum(means[side].values()) / len(SIGMAS) for side in ("left", "right"))
    return {"loss": options.left_weight * left + options.right_weight * right, **means}


@torch.no_grad()
def sample_sheet(
    pipe: Any, latents: Latents, text: Text, rows: Sequence[int], canvas: Canvas, options: Options
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
    width, height = canvas.panel_width, canvas.panel_height
    sheet = Image.new("RGB", (3 * width, len(rows) * height))
    for line, row in enumerate(rows):
        clean, _ = latents.gather([row])
        pixels = pipe.decode_canvas(clean.to(device, pipe.vae.dtype), canvas)
        reference, target = pipe.image_processor.postprocess(torch.cat(pixels.chunk(2, dim=-1)), output_type="pil")
        embeds, pooled = text.gather([latents.samples[row].told(options.instructions == 1)])
        with mixed:
            (drawn,) = pipe(
                reference=reference,
                prompt_embeds=embeds.to(device, dtype),
                pooled_prompt_embeds=pooled.to(device, dtype),
                height=height,
                width=width,
                num_inference_steps=options.sample_steps,
                guidance_scale=options.sample_guidance,
                generator=line,
            ).images
        for column, panel in enumerate((reference, target, drawn)):
            sheet.paste(panel, (column * width, line * height))
    return sheet
