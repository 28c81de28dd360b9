"""The method's inference in plain PyTorch: everything but the networks is in this file.

    diptych convert pocket folded --to folded --base pocket --dtype float32
    python examples/plain_pytorch.py folded examples/references/cat.png "a cat on the beach" out.png

Optional arguments after these: seed, steps, image and text guidance.
The image equals that of `Student.generate` with the same settings, up to float rounding. The schedule must have a fixed
shift, as the pocket's has; FLUX.1-dev's shift depends on the canvas and is rejected.
Shapes: R × K tokens of the canvas, C latent channels.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image, ImageOps
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

GUIDED_FROM = 2  # the first two steps are not guided, as in the released code


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Converts latents (1, C, 2R, 2K) to tokens (1, R·K, 4C): 2 × 2 latents are one token."""
    _, c, h, w = latents.shape
    return latents.view(1, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Converts tokens (1, R·K, 4C) to latents (1, C, h, w) with h = 2R, w = 2K."""
    c = tokens.shape[-1] // 4
    return tokens.view(1, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, c, h, w)


def position_ids(rows: int, columns: int) -> torch.Tensor:
    """Returns (R·K, 3): 0, row, column. The two panels are one wide image."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.view(-1, 3)


def read(folder: str, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a text's T5 tokens (1, L, D) and its pooled CLIP vector (1, P)."""
    outputs = []
    for name, kind in (("", CLIPTextModel), ("_2", T5EncoderModel)):
        tokenizer = AutoTokenizer.from_pretrained(folder, subfolder=f"tokenizer{name}")
        encoder = kind.from_pretrained(folder, subfolder=f"text_encoder{name}")
        length = min(512, tokenizer.model_max_length)
        ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        outputs.append(encoder(ids))
    return outputs[1].last_hidden_state, outputs[0].pooler_output


@torch.no_grad()
def main(
    folder: str, reference: str, prompt: str, out: str, seed: int = 0, steps: int = 16, i: float = 1.5, t: float = 2.0
) -> None:
    """Generates the image. `i` and `t` are the image and text guidance; 1 turns each off."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    schedule = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config
    if schedule.use_dynamic_shifting or schedule.shift != 1:
        sys.exit("This model shifts its timesteps. Use diptych, or examples/stock_diffusers.py.")
    side = min(512, vae.config.sample_size)
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    h, w = side // shrink, 2 * side // shrink

    # The condition: [reference | black], encoded as one image.
    fitted = ImageOps.fit(Image.open(reference).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    panel = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = vae.encode(torch.cat([panel, torch.full_like(panel, -1)], dim=3)).latent_dist.mode()
    shift, scale = vae.config.shift_factor or 0, vae.config.scaling_factor
    condition = pack((latents - shift) * scale)
    nothing = torch.zeros_like(condition)

    texts = {"prompt": read(folder, prompt), "empty": read(folder, "")}
    ids = position_ids(h // 2, w // 2)
    guidance = torch.tensor([3.5]) if transformer.config.guidance_embeds else None

    def v(x: torch.Tensor, sigma: float, seen: torch.Tensor, text: str) -> torch.Tensor:
        """Returns the velocity at x (1, R·K, 4C); the condition `seen` is concatenated to the channels of x."""
        embeds, pooled = texts[text]
        return transformer(
            hidden_states=torch.cat([x, seen], dim=2),
            timestep=torch.tensor([sigma]),
            guidance=guidance,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=torch.zeros(embeds.shape[1], 3),
            img_ids=ids,
        ).sample

    # Euler steps from noise (sigma 1) to the image (sigma 0); both panels are generated.
    noise = pack(torch.randn(1, condition.shape[-1] // 4, h, w, generator=torch.Generator().manual_seed(seed)))
    x, null = noise, None
    left = (torch.arange(w // 2) < w // 4).repeat(h // 2)[None, :, None]  # tokens of the left panel
    sigmas = [*np.linspace(1, 1 / steps, steps).tolist(), 0.0]
    for step, (now, after) in enumerate(pairwise(sigmas)):
        both = v(x, now, condition, "prompt")
        if step >= GUIDED_FROM and (i > 1 or t > 1):
            # The null pass must not see the reference on the canvas either, so it has a separate left panel.
            # (A student without "null_panel": "own" in its settings gets x here, as in the released code.)
            null = now * noise if null is None else null
            none, image = v(torch.where(left, null, x), now, nothing, "empty"), v(x, now, condition, "empty")
            null = null + (after - now) * none
            none = torch.where(left, image, none)  # the left panel is not guided away from the reference
            both = none + i * (image - none) + t * (both - image)
        x = x + (after - now) * both

    pixels = vae.decode(unpack(x, h, w) / scale + shift).sample[0, :, :, side:]
    array = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(out)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*given[:4], *map(int, given[4:6]), *map(float, given[6:8]))  # pyright: ignore[reportArgumentType]
