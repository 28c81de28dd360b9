"""The pocket judges: three stock `transformers` vision models, trained apart on renders of their own.

* `curator` (ResNet) and `scorer` (RegNet) embed a panel so that the same subject in two scenes is close and a
  drifted or another subject of its kind is far.
* `reader` (ResNet with a linear head) names place, light, pose, prop, framing, weather and kind, and gives an
  identity embedding of its own.

Half of what they see has been through the VAE, blurred or noisy, because what they judge will be.
"""

import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .. import world
from . import vae as vae_training
from .loop import Trainer

SEEDS = {"curator": 11, "scorer": 22, "reader": 33}
IDENTITY = 32
"""Coordinates of the reader's identity embedding."""
GROUPS = {
    "place": world.PLACES,
    "light": world.DIRECTIONS,
    "colour": tuple(world.LIGHT_COLOURS),
    "intensity": tuple(world.INTENSITIES),
    "pose": world.POSES,
    "prop": world.PROPS,
    "framing": world.FRAMINGS,
    "weather": world.WEATHERS,
    "kind": world.TRAIN_KINDS,
}
LABELS = [f"{group}:{value}" for group, values in GROUPS.items() for value in values] + [
    f"identity:{n}" for n in range(IDENTITY)
]
TEMPERATURE = 0.07
CHUNK = 400


def truth(identity: world.Identity, scene: world.Scene) -> list[int]:
    """The index of the true value in each of `GROUPS`."""
    light = scene.light
    values = (
        scene.place,
        light.direction,
        light.colour,
        light.intensity,
        scene.pose,
        scene.prop,
        scene.framing,
        scene.weather,
        identity.kind,
    )
    return [options.index(value) for options, value in zip(GROUPS.values(), values, strict=True)]


def triplet(index: int, seed: int):
    """A subject, the same one in another scene, and one that drifted from it (often by a single group of
    attributes): uint8 `[3, 64, 64, 3]`, labels `[3, 9]`."""
    rng = np.random.default_rng([seed, index])
    identity = world.sample_identity(rng)
    drifted = world.drift(rng, identity, int(rng.choice([1, 1, 2, 3, 6])))
    scenes = [world.sample_scene(rng) for _ in range(3)]
    subjects = (identity, identity, drifted)
    panels = [world.render(subject, scene) for subject, scene in zip(subjects, scenes, strict=True)]
    return np.stack(panels), np.array(
        [truth(subject, scene) for subject, scene in zip(subjects, scenes, strict=True)], dtype=np.int16
    )


def _chunk(arguments):
    start, stop, seed = arguments
    panels, labels = zip(*(triplet(n, seed) for n in range(start, stop)), strict=True)
    return np.stack(panels), np.stack(labels)


def render(work: Path, role: str, count: int, processes: int = 2, report=print) -> tuple[np.ndarray, np.ndarray]:
    """`count` triplets for `role`, rendered once into `work/judges/`."""
    folder = work / "judges"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{role}-{count}.npz"
    if not path.exists():
        todo = [(s, min(s + CHUNK, count), SEEDS[role]) for s in range(0, count, CHUNK)]
        with get_context("spawn").Pool(processes) as pool:
            panels, labels = zip(*pool.imap(_chunk, todo), strict=True)
        partial = folder / f"{role}.tmp.npz"
        np.savez(partial, panels=np.concatenate(panels), labels=np.concatenate(labels))
        partial.rename(path)
        report(f"rendered {count} triplets for the {role}")
    data = np.load(path)
    return data["panels"], data["labels"]


def make(role: str):
    """An untrained stock model for `role`."""
    from transformers import RegNetConfig, RegNetModel, ResNetConfig, ResNetForImageClassification, ResNetModel

    if role == "curator":
        return ResNetModel(
            ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic")
        )
    if role == "scorer":
        return RegNetModel(
            RegNetConfig(
                embedding_size=24, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], groups_width=16, layer_type="y"
            )
        )
    labels = dict(enumerate(LABELS))
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[32, 64, 128, 160],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            id2label=labels,
            label2id={v: k for k, v in labels.items()},
        )
    )


def degrade(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Blur half of the panels a little or a lot, and add a little noise to them."""
    n, _, h, w = x.shape
    chosen = torch.rand(n, generator=rng) < 0.5
    small = F.interpolate(
        x, scale_factor=float(torch.empty(1).uniform_(0.4, 0.9, generator=rng)), mode="bilinear", antialias=True
    )
    blurred = F.interpolate(small, size=(h, w), mode="bilinear")
    noise = torch.randn(x.shape, generator=rng) * torch.rand(n, 1, 1, 1, generator=rng) * 0.08
    return torch.where(chosen[:, None, None, None], blurred + noise, x)


def contrast(a: torch.Tensor, b: torch.Tensor, drifted: torch.Tensor) -> torch.Tensor:
    """InfoNCE: each subject must find its own other scene among all of the batch's and among the drifted ones. All
    `[N, D]`."""
    a, b, drifted = (F.normalize(v.float(), dim=1) for v in (a, b, drifted))
    target = torch.arange(len(a))
    forward = torch.cat([a @ b.T, a @ drifted.T], 1) / TEMPERATURE
    backward = torch.cat([b @ a.T, b @ drifted.T], 1) / TEMPERATURE
    return 0.5 * (F.cross_entropy(forward, target) + F.cross_entropy(backward, target))


def outputs(model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embedding `[N, D]` and, for the reader, attribute logits `[N, L]`."""
    out = model(x)
    if hasattr(out, "logits"):
        return out.logits[:, -IDENTITY:], out.logits[:, :-IDENTITY]
    return out.pooler_output.flatten(1), None


def attribute_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    start, total = 0, torch.zeros(())
    for column, values in enumerate(GROUPS.values()):
        total = total + F.cross_entropy(logits[:, start : start + len(values)].float(), labels[:, column].long())
        start += len(values)
    return total / len(GROUPS)


@torch.no_grad()
def through_vae(work: Path, panels: np.ndarray, batch: int = 100) -> np.ndarray:
    """What the VAE makes of uint8 panels `[N, 64, 64, 3]`."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    out = np.empty_like(panels)
    for start in range(0, len(panels), batch):
        x = vae_training.to_tensor(panels[start : start + batch])
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        out[start : start + batch] = ((y.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return out


@torch.no_grad()
def measure(model, panels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """On held-out triplets: the chance that a true pair scores above a drifted one (AUC), and for the reader each
    attribute's accuracy."""
    parts = [
        outputs(model, vae_training.to_tensor(block))
        for block in np.array_split(panels.reshape(-1, *panels.shape[2:]), 12)
    ]
    vectors = F.normalize(torch.cat([p[0] for p in parts]), dim=1).view(len(panels), 3, -1)
    same, other = (vectors[:, 0] * vectors[:, 1]).sum(1), (vectors[:, 0] * vectors[:, 2]).sum(1)
    result = {
        "auc_drifted": float((same[:, None] > other[None]).float().mean()),
        "same": float(same.mean()),
        "drifted": float(other.mean()),
    }
    if read := [logits for _, logits in parts if logits is not None]:
        logits, start = torch.cat(read), 0
        flat = torch.from_numpy(labels.reshape(-1, labels.shape[-1])).long()
        for column, (group, values) in enumerate(GROUPS.items()):
            result[group] = float((logits[:, start : start + len(values)].argmax(1) == flat[:, column]).float().mean())
            start += len(values)
    return {name: round(value, 4) for name, value in result.items()}


def train(
    work: Path, role: str, minutes: float, count: int = 12000, batch: int = 96, rate: float = 2e-3, report=print
) -> None:
    """Train `role`'s model for `minutes` and save its folder in `work/<role>`, with its held-out errors in the log."""
    from transformers import ViTImageProcessorPil

    torch.manual_seed(SEEDS[role])
    panels, labels = render(work, role, count + 600, report=report)
    held_out, held_labels = panels[count:], labels[count:]
    drawn = panels[:count].copy()
    softened = np.random.default_rng(0).permutation(count)[: int(count * 0.4)]
    drawn[softened] = through_vae(work, drawn[softened].reshape(-1, *drawn.shape[2:])).reshape(-1, *drawn.shape[1:])
    model = make(role).train()
    trainer = Trainer(work / f"{role}_training", {"model": model}, rate=rate, weight_decay=0.02, ema=0.99)
    rng, generator = np.random.default_rng(trainer.step), torch.Generator().manual_seed(trainer.step)
    started = time.monotonic()
    while (passed := (time.monotonic() - started) / 60) < minutes:
        pick = rng.choice(count, batch, replace=False)
        x = degrade(vae_training.to_tensor(drawn[pick].reshape(-1, *drawn.shape[2:])), generator)
        with torch.autocast("cpu", torch.bfloat16):
            vectors, logits = outputs(model, x)
        vectors = vectors.view(batch, 3, -1)
        value = contrast(vectors[:, 0], vectors[:, 1], vectors[:, 2])
        if logits is not None:
            value = 0.5 * value + attribute_loss(logits, torch.from_numpy(labels[pick].reshape(-1, labels.shape[-1])))
        trainer.update(value, scale=max(0.01, min(1.0, 1.6 * (1 - passed / minutes))))
        if trainer.step % 100 == 0:
            report(trainer.log(loss=round(float(value), 4), minutes=round(passed, 2)))
    model.eval()
    report(trainer.log(role=role, samples=trainer.step * batch * 3, **measure(model, held_out, held_labels)))
    trainer.save()
    model.save_pretrained(work / role)
    side = {"height": world.PANEL, "width": world.PANEL}
    ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(work / role)
