"""The pocket VAE: a stock `AutoencoderKL`, trained on single panels."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .. import world
from . import renders
from .trainer import Pretraining, mean, mixed, pick_device, resident

KL_WEIGHT = 2e-4
WIDTHS = (24, 48, 64, 96)
"""Channels of the blocks, each but the last of which halves the side."""
FACTOR = 2 ** (len(WIDTHS) - 1)
"""Pixels of a panel's side to one of its latent's."""
LATENTS = 16
"""Channels of a latent."""


def make():
    """An untrained VAE."""
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {  # diffusers annotates these as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
        "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
        "block_out_channels": WIDTHS,
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=8,
        sample_size=world.PANEL,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def to_tensor(panels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 `[N, H, W, 3]` to float `[N, 3, H, W]` in −1..1, where the panels are."""
    if isinstance(panels, np.ndarray):
        panels = torch.from_numpy(np.ascontiguousarray(panels))
    return panels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Absolute, squared and edge error of images `y` to `x` `[N, 3, H, W]`. Returns the loss and the mean squared
    error."""
    square = F.mse_loss(y, x)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
    return F.l1_loss(y, x) + 2 * square + 0.5 * edge, square.detach()


def loss(vae, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction plus a light KL term. Returns the loss and the mean squared error."""
    posterior = vae.encode(x).latent_dist
    error, square = reconstruction(vae.decode(posterior.sample()).sample.float(), x)
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error + KL_WEIGHT * kl, square


@torch.no_grad()
def psnr(vae, latents: torch.Tensor, images: np.ndarray) -> float:
    """Mean PSNR in dB of decoded `latents`, before scaling, against uint8 images `[N, H, W, 3]`, peak 1."""
    x = to_tensor(images)
    y = torch.cat([vae.decode(part).sample.clamp(-1, 1).cpu() for part in latents.to(vae.device).split(50)])
    error = ((x - y) / 2).pow(2).mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(error)).mean())


@torch.no_grad()
def encode(vae, panels: np.ndarray, batch: int = 100) -> torch.Tensor:
    """Posterior modes of uint8 panels, float16 `[N, LATENTS, H/FACTOR, W/FACTOR]`, before scaling."""
    parts = []
    for start in range(0, len(panels), batch):
        x = to_tensor(panels[start : start + batch]).to(vae.device)
        with mixed(vae.device):
            parts.append(vae.encode(x).latent_dist.mode().half().cpu())
    return torch.cat(parts)


def train(
    work: Path,
    minutes: float,
    batch: int = 32,
    rate: float = 2e-3,
    start: Path | None = None,
    device: str = "auto",
    report=print,
) -> None:
    """Train for `minutes` more (decaying the rate to nothing over them) and save a diffusers folder in `work/vae`.
    `start` is a VAE folder to begin from where no state is."""
    torch.manual_seed(0)
    place = pick_device(device)
    vae: Any = make()
    if start is not None:
        begun: Any = type(vae).from_pretrained(start)
        vae.load_state_dict(begun.state_dict())
        vae.register_to_config(shift_factor=begun.config.shift_factor, scaling_factor=begun.config.scaling_factor)
    vae.to(place, memory_format=torch.channels_last if place.type == "cuda" else torch.contiguous_format)
    trainer = Pretraining(work / "vae_training", {"vae": vae}, rate=rate, weight_decay=1e-4, ema=0.998)
    if start is not None and trainer.step == 0:
        trainer.log(start=start.name)
    held_out = np.stack([renders.pair(n, seed=99)[0][0] for n in range(200)])
    panels, _ = renders.load(work / "pairs")
    panels = panels.reshape(-1, *panels.shape[2:])
    picked = resident(panels, place)
    rng = np.random.default_rng(trainer.step)
    started, squares = time.monotonic(), []
    while (passed := (time.monotonic() - started) / 60) < minutes:
        index = torch.from_numpy(np.sort(rng.choice(len(panels), batch))).to(place)
        with mixed(place):
            value, square = loss(vae, to_tensor(picked[index]))
        trainer.update(value, scale=min(1.0, max(0.02, 2.0 * (1 - passed / minutes))))
        squares.append(square)
        if trainer.step % 200 == 0:
            report(trainer.log(square=mean(squares), samples=trainer.step * batch, minutes=round(passed, 2)))
            squares.clear()
        if trainer.step % 600 == 0:
            trainer.save()
    with trainer.averaged():
        latents = encode(vae, panels[:4000]).float()
        vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
        report(
            trainer.log(
                psnr=psnr(vae, encode(vae, held_out).float(), held_out),
                minutes=round(passed, 2),
                per_channel_std=[round(float(s), 3) for s in latents.std((0, 2, 3))],
            )
        )
        vae.to(memory_format=torch.contiguous_format).save_pretrained(work / "vae")
    trainer.save()
