"""A student in stock diffusers: FluxControlPipeline on a canvas of [reference | black], cropped to the right half.

    diptych convert pocket folded --to folded --base pocket --dtype float32
    python examples/stock_diffusers.py folded examples/references/cat.png "a cat on the beach" out.png [SEED STEPS]

This is sampling without guidance: the method's guidance needs three forward passes per step, which stock diffusers does
not support here (examples/plain_pytorch.py does). Stock diffusers samples the VAE's posterior for the condition, where
diptych uses its mode, so images differ slightly from `Student.generate(…, image_guidance=1, text_guidance=1)`.
"""

from __future__ import annotations

import sys

import torch
from diffusers import FluxControlPipeline
from PIL import Image, ImageOps


def main(folder: str, reference: str, prompt: str, out: str, seed: int = 0, steps: int = 16) -> None:
    pipe = FluxControlPipeline.from_pretrained(folder)
    side = min(512, pipe.vae.config.sample_size)
    canvas = Image.new("RGB", (2 * side, side))  # black, with the reference on the left
    canvas.paste(ImageOps.fit(Image.open(reference).convert("RGB"), (side, side), Image.Resampling.LANCZOS))

    # The noise is passed as latents, since the condition would use a generator first.
    channels, latent = pipe.transformer.config.in_channels // 8, side // pipe.vae_scale_factor
    noise = torch.randn(1, channels, latent, 2 * latent, generator=torch.Generator().manual_seed(seed))
    image = pipe(
        prompt=prompt,
        control_image=canvas,
        height=side,
        width=2 * side,
        num_inference_steps=steps,
        guidance_scale=3.5,  # used only by models with distilled guidance, such as FLUX.1-dev
        latents=pipe._pack_latents(noise, 1, channels, latent, 2 * latent),
        generator=torch.Generator().manual_seed(seed),  # for the posterior's sample
        max_sequence_length=min(512, pipe.tokenizer_2.model_max_length),
    ).images[0]
    image.crop((side, 0, 2 * side, side)).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:7]))  # pyright: ignore[reportArgumentType]
