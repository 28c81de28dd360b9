"""A student with stock diffusers alone: FluxControlPipeline on a canvas of [reference | black], right half out.

    diptych convert pocket folded --to folded --base pocket --dtype float32
    python examples/stock_diffusers.py folded examples/references/cat.png "a cat on the beach" out.png [SEED STEPS]

Plain sampling: the method's true guidance needs three forwards a step, which stock diffusers does not do here
(examples/plain_pytorch.py does). Stock diffusers samples the VAE's posterior for the condition, where diptych takes
its mode, so the pictures differ a little from `Student.generate(…, image_guidance=1, text_guidance=1)`.
"""

from __future__ import annotations

import sys

import torch
from diffusers import FluxControlPipeline
from PIL import Image, ImageOps


def main(folder: str, reference: str, prompt: str, out: str, seed: int = 0, steps: int = 16) -> None:
    pipe = FluxControlPipeline.from_pretrained(folder)
    side = min(512, pipe.vae.config.sample_size)
    canvas = Image.new("RGB", (2 * side, side))  # black; the reference goes to the left
    canvas.paste(ImageOps.fit(Image.open(reference).convert("RGB"), (side, side), Image.Resampling.LANCZOS))

    # Noise given as latents: with a generator alone, the condition would draw from it first.
    channels, latent = pipe.transformer.config.in_channels // 8, side // pipe.vae_scale_factor
    noise = torch.randn(1, channels, latent, 2 * latent, generator=torch.Generator().manual_seed(seed))
    picture = pipe(
        prompt=prompt,
        control_image=canvas,
        height=side,
        width=2 * side,
        num_inference_steps=steps,
        guidance_scale=3.5,  # read only by a model with distilled guidance, such as FLUX.1-dev's
        latents=pipe._pack_latents(noise, 1, channels, latent, 2 * latent),
        generator=torch.Generator().manual_seed(seed),  # for the posterior's sample
        max_sequence_length=min(512, pipe.tokenizer_2.model_max_length),
    ).images[0]
    picture.crop((side, 0, 2 * side, side)).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:7]))  # pyright: ignore[reportArgumentType]
