"""Trains the decoder of the pocket VAE to decode latents that are slightly off, as generated latents are.

A decoder that has only seen its encoder's latents turns small errors into specks, streaks and doubled outlines. Here
the decoder sees three kinds of latents, and its target is always the true render:

- the encoder's latents;
- the encoder's latents with white noise;
- latents that the teacher recovers from noise at a moderate level, with its guidance. Their errors are the teacher's.

The encoder and the scaling of its latents do not change, so the teacher, the student and its pairs stay valid. The loss
is the VAE's reconstruction error. It has no term from the judges' features, because the judges score what this decoder
produces.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import renders
from .teacher import pack
from .trainer import Pretraining, mean, pick_device
from .vae import psnr, reconstruction, to_tensor

WHITE = 0.45
"""Largest standard deviation of the white noise, as a share of each channel's spread."""
SHARES = (0.45, 0.2, 0.35)
"""Shares of true latents, of latents with white noise, and of the teacher's latents."""
LEVELS = (0.1, 0.5)
"""Noise levels σ from which the teacher recovers a latent."""
MOST_STEPS = 4
"""The teacher recovers a latent in 1 to this many steps. One step is its estimate x̂0 = x_t − σ·v."""
GUIDANCE = (1.0, 3.5)
"""Text guidance of the teacher while it recovers latents."""
SINGLES = 0.5
"""Share of the batches that are single panels. The others are grids, which are decoded as one canvas."""
POOL, PORTION, USES = 128, 32, 4
"""Grids in the pool, grids that replace the oldest at a time, and how often each grid is used, on average."""
SAVED_EVERY = 300
"""Seconds between checkpoints, each with the averaged VAE in `work/decoder`."""
HELD_OUT, NOISES = 12, (0, 0.2)
"""Grids of other renders for the PSNR in the log, and the noise of their latents."""


def canvases(panels: np.ndarray) -> np.ndarray:
    """Pairs of panels `[N, 2, H, W, 3]` as grids `[N, H, 2W, 3]`."""
    return panels.transpose(0, 2, 1, 3, 4).reshape(len(panels), panels.shape[2], -1, 3)


def spread(latents: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each channel of latents `[N, C, H, W]`: `[1, C, 1, 1]`."""
    return latents.std((0, 2, 3), keepdim=True)


@torch.no_grad()
def encode(vae, images: np.ndarray) -> torch.Tensor:
    """Posterior modes `[N, C, H, W]` of uint8 images, before scaling, in the VAE's precision, as students encode."""
    parts = [vae.encode(part.to(vae.device)).latent_dist.mode() for part in to_tensor(images).split(PORTION)]
    return torch.cat(parts)


@torch.no_grad()
def recover(
    teacher, latents: torch.Tensor, prompts: Sequence[str], sigma: float, steps: int, guidance: float, seed: int
) -> torch.Tensor:
    """Adds noise of level `sigma` to the latents `[N, C, H, W]` of grids, and lets the `FluxPipeline` `teacher` remove
    it in `steps` Euler steps of equal length."""
    config, (_, _, rows, columns) = teacher.vae.config, latents.shape
    clean = pack((latents - config.shift_factor) * config.scaling_factor)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean.device)
    tokens = teacher(
        list(prompts),
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=guidance,
        height=rows * teacher.vae_scale_factor,
        width=columns * teacher.vae_scale_factor,
        num_inference_steps=steps,
        sigmas=[sigma * (1 - n / steps) for n in range(steps)],
        latents=(1 - sigma) * clean + sigma * noise,
        max_sequence_length=teacher.tokenizer_2.model_max_length,
        output_type="latent",
    ).images
    size = rows * teacher.vae_scale_factor, columns * teacher.vae_scale_factor
    unpacked = teacher._unpack_latents(tokens, *size, teacher.vae_scale_factor)
    return unpacked / config.scaling_factor + config.shift_factor


class LatentPool:
    """Grids with their true latents and those that the teacher recovered, a portion of which is replaced at a time.

    `panels` uint8 `[N, 2, H, W, 3]` and `rows` are finished renders. `refresh` is slow, so each grid is used several
    times, with other noise each time.
    """

    def __init__(self, teacher, panels: np.ndarray, rows: list[dict], rng: np.random.Generator):
        self.teacher, self.panels, self.rows, self.rng = teacher, panels, rows, rng
        self.legible = np.flatnonzero([bool(row["grid"][0]) for row in rows])
        self.images, self.true, self.recovered = (torch.empty(0) for _ in range(3))
        while len(self.true) < POOL:
            self.refresh()
        self.spread = spread(self.true)

    def refresh(self) -> None:
        rng, count = self.rng, min(PORTION, POOL)
        pick = np.sort(rng.choice(self.legible, count))
        images = canvases(np.asarray(self.panels[pick]))
        true = encode(self.teacher.vae, images)
        prompts = [self.rows[n]["grid"][int(rng.integers(len(self.rows[n]["grid"])))] for n in pick]
        recovered = recover(
            self.teacher,
            true,
            prompts,
            sigma=float(rng.uniform(*LEVELS)),
            steps=int(rng.integers(1, MOST_STEPS + 1)),
            guidance=float(rng.uniform(*GUIDANCE)),
            seed=int(rng.integers(2**31)),
        )
        parts = (self.images, torch.from_numpy(images)), (self.true, true), (self.recovered, recovered)
        kept = min(len(self.true), POOL - count)
        self.images, self.true, self.recovered = (
            torch.cat([old[len(old) - kept :].to(new), new]) if kept else new for old, new in parts
        )

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 and latents of `count` grids, or of twice as many single panels."""
        rng = self.rng
        pick = torch.from_numpy(rng.choice(len(self.true), count, replace=False))
        kind = torch.from_numpy(rng.choice(3, count, p=SHARES))[:, None, None, None].to(self.true.device)
        level = WHITE * torch.from_numpy(rng.random(count, dtype=np.float32))[:, None, None, None].to(self.true.device)
        noise = torch.from_numpy(rng.standard_normal(self.true[pick].shape, dtype=np.float32)).to(self.true.device)
        images, latents = self.images[pick], self.true[pick]
        latents = torch.where(kind == 1, latents + level * noise * self.spread, latents)
        latents = torch.where(kind == 2, self.recovered[pick], latents)
        if rng.random() < SINGLES:
            return torch.cat(images.chunk(2, 2)), torch.cat(latents.chunk(2, 3))
        return images, latents


@torch.no_grad()
def measure(vae, images: np.ndarray, noises: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean PSNR in dB, peak 1, of uint8 `images` `[N, H, W, 3]` decoded from their latents with white noise of each of
    `noises`, shares of each channel's spread."""
    latents = encode(vae, images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents) * spread(latents)
    return {f"{level:g}": round(psnr(vae, latents + level * noise, images), 3) for level in noises}


def open_teacher(folder: Path, device: torch.device) -> Any:
    """The `FluxPipeline` in `folder`, in float32."""
    from diffusers import FluxPipeline

    # Captions longer than CLIP's length are cut in the teacher's own training too.
    logging.getLogger("diffusers.pipelines.flux").setLevel(logging.ERROR)
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(
    work: Path,
    teacher: Path,
    minutes: float,
    samples: int = 20000,
    batch: int = 12,
    rate: float = 6e-4,
    device: str = "auto",
    report=print,
) -> None:
    """Train the decoder of the VAE of the `FluxPipeline` folder `teacher` on the renders in `work/pairs`, and save the
    whole VAE, with the decoder's averaged weights, in `work/decoder`.

    The rate falls to nothing over `samples` panels, all sittings together. A sitting ends after `minutes` if they are
    not reached by then, and the next one resumes. `batch` counts panels.
    """
    place = pick_device(device)
    pipeline = open_teacher(teacher, place)
    vae = type(pipeline.vae).from_pretrained(teacher / "vae", torch_dtype=torch.float32).to(place)
    vae.encoder.requires_grad_(False)
    trainer = Pretraining(work / "decoder_training", {"decoder": vae.decoder}, rate=rate, weight_decay=1e-4, ema=0.998)
    panels = np.stack([renders.pair(n, seed=99)[0] for n in range(HELD_OUT)])

    def measured() -> dict[str, dict[str, float]]:
        return {
            "panels": measure(vae, panels.reshape(-1, *panels.shape[2:]), NOISES),
            "grids": measure(vae, canvases(panels), NOISES),
        }

    def checkpoint() -> None:
        trainer.save()
        with trainer.averaged():
            report(trainer.log(samples=trainer.step * batch, psnr=measured()))
            vae.save_pretrained(work / "decoder")

    if not (trainer.folder / "log.jsonl").exists():
        trainer.log(start=teacher.name, psnr=measured())
    opened = trainer.elapsed
    trainer.log(sitting={"batch": batch, "rate": rate, "until": samples, "shares": SHARES})
    pool = LatentPool(pipeline, *renders.load(work / "pairs"), np.random.default_rng(trainer.step))
    squares, saved, used = [], trainer.elapsed, 0
    while (seen := trainer.step * batch) < samples and trainer.elapsed - opened < 60 * minutes:
        images, latents = pool.batch(batch // 2)
        value, square = reconstruction(vae.decode(latents).sample.float(), to_tensor(images).to(place))
        trainer.update(value, scale=max(0.01, 1 - seen / samples))
        squares.append(square)
        used += batch // 2
        if used >= PORTION * USES:
            pool.refresh()
            used = 0
        if trainer.step % 50 == 0:
            report(trainer.log(square=mean(squares), samples=trainer.step * batch))
            squares.clear()
        if trainer.elapsed - saved > SAVED_EVERY:
            checkpoint()
            saved = trainer.elapsed
    checkpoint()
