"""The pocket judges: three stock `transformers` vision models, trained apart on renders of their own.

* `curator` (ResNet) and `scorer` (RegNet) embed a panel so that the same subject in two scenes is close and a
  drifted or another subject of its kind is far.
* `reader` (ResNet with a linear head) names place, light, pose, prop, framing, weather and kind, and gives an
  identity embedding of its own.

Each learns from its own third of the rendered pairs. Telling same from drifted pairs alone is a thin signal, so while
they train, a linear layer must also read every attribute of the subject from the embedding; it does not ship.
Most of what they see has been through the VAE, with errors in the latents, or is blurred or noisy, because what they
judge will be.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diptych.utils.io import publish

from .. import world
from ..render import render
from . import renders
from . import vae as vae_training
from .trainer import Pretraining, TraitHead, mean, mixed, pick_device, resident, traits_table

SEEDS = {"curator": 11, "scorer": 22, "reader": 33}
HELD_OUT = 600
"""Triplets on which a judge's errors are measured."""
INPUT = {"curator": 64, "scorer": 64, "reader": 64}
"""Side in pixels at which panels enter."""
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
    **world.TRAITS,
}
LABELS = [f"{group}:{value}" for group, values in GROUPS.items() for value in values] + [
    f"identity:{n}" for n in range(IDENTITY)
]
TEMPERATURE = 0.07
CHUNK = 100


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
        *world.traits(identity).values(),
    )
    return [options.index(value) for options, value in zip(GROUPS.values(), values, strict=True)]


def triplet(index: int, seed: int):
    """A subject, the same one in another scene, and one that drifted from it: uint8 `[3, H, W, 3]`, labels
    `[3, groups]`."""
    rng = np.random.default_rng([seed, index])
    identity = world.sample_identity(rng)
    drifted = world.drift(rng, identity)
    scenes = [world.sample_scene(rng) for _ in range(3)]
    subjects = (identity, identity, drifted)
    panels = [render(subject, scene) for subject, scene in zip(subjects, scenes, strict=True)]
    return np.stack(panels), np.array(
        [truth(subject, scene) for subject, scene in zip(subjects, scenes, strict=True)], dtype=np.int16
    )


def _chunk(arguments):
    start, stop, seed = arguments
    panels, labels = zip(*(triplet(n, seed) for n in range(start, stop)), strict=True)
    return np.stack(panels), np.stack(labels)


def held_out(
    work: Path, role: str, count: int = HELD_OUT, processes: int = 1, report=print
) -> tuple[np.ndarray, np.ndarray]:
    """`count` triplets of subjects that nothing was trained on, rendered once into `work/judges/`."""
    path = work / "judges" / f"{role}-{count}.npz"
    if not path.exists():
        todo = [(s, min(s + CHUNK, count), SEEDS[role]) for s in range(0, count, CHUNK)]
        panels, labels = zip(*renders.spread(_chunk, todo, processes), strict=True)
        with publish(path) as partial, partial.open("wb") as stream:  # by its name, numpy would add an ending
            np.savez(stream, panels=np.concatenate(panels), labels=np.concatenate(labels))
        report(f"rendered {count} triplets for the {role}")
    data = np.load(path)
    return data["panels"], data["labels"]


def make(role: str):
    """An untrained stock model for `role`."""
    from transformers import RegNetConfig, RegNetModel, ResNetConfig, ResNetForImageClassification, ResNetModel

    if role == "curator":
        return ResNetModel(
            ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 128, 192], depths=[1, 1, 1, 1], layer_type="basic")
        )
    if role == "scorer":
        return RegNetModel(
            RegNetConfig(
                embedding_size=32,
                hidden_sizes=[32, 64, 128, 192],
                depths=[1, 1, 2, 1],
                groups_width=16,
                layer_type="y",
                downsample_in_first_stage=True,
            )
        )
    labels = dict(enumerate(LABELS))
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            id2label=labels,
            label2id={v: k for k, v in labels.items()},
        )
    )


class Head(torch.nn.Module):
    """What a judge is trained through and ships without: what reads the subject's traits from the embedding, and the
    scale and offset that turn a cosine into the odds of one subject."""

    def __init__(self, width: int):
        super().__init__()
        self.traits = TraitHead(width)
        self.scale, self.offset = torch.nn.Parameter(torch.tensor(10.0)), torch.nn.Parameter(torch.tensor(-6.0))

    def pair_loss(self, a: torch.Tensor, b: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of same or drifted, and InfoNCE: each subject against the other scenes of the batch. Embeddings
        `[N, D]`, `same` bool `[N]`."""
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
        cosine = a @ b.T
        drifted = F.binary_cross_entropy_with_logits(self.scale * cosine.diagonal() + self.offset, same.float())
        target = torch.arange(len(a), device=a.device)[same]
        contrast = sum(F.cross_entropy(rows[same] / TEMPERATURE, target) for rows in (cosine, cosine.T))
        return drifted + 0.25 * contrast


def degrade(x: torch.Tensor, shrink: float, rng: torch.Generator) -> torch.Tensor:
    """Blur half of the panels, by making them `shrink` times as large and back, and add a little noise to them. `rng`
    is on the panels' device."""
    n, _, h, w = x.shape
    chosen = torch.rand(n, generator=rng, device=x.device) < 0.5
    small = F.interpolate(x, scale_factor=shrink, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size=(h, w), mode="bilinear")
    strength = torch.rand(n, 1, 1, 1, generator=rng, device=x.device) * 0.08
    noise = torch.randn(x.shape, generator=rng, device=x.device) * strength
    return torch.where(chosen[:, None, None, None], blurred + noise, x)


def outputs(model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embedding `[N, D]` and, for the reader, attribute logits `[N, L]`."""
    out = model(x)
    if hasattr(out, "logits"):
        return out.logits[:, -IDENTITY:], out.logits[:, :-IDENTITY]
    return out.pooler_output.flatten(1), None


def attribute_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    start, total = 0, torch.zeros((), device=logits.device)
    for column, values in enumerate(GROUPS.values()):
        total = total + F.cross_entropy(logits[:, start : start + len(values)].float(), labels[:, column].long())
        start += len(values)
    return total / len(GROUPS)


@torch.no_grad()
def through_vae(
    work: Path, panels: np.ndarray, rng: torch.Generator, device: str = "auto", batch: int = 100
) -> np.ndarray:
    """What the VAE makes of uint8 panels `[N, H, W, 3]`, with errors in their latents such as a teacher makes."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(work / "vae")
    vae.eval().to(pick_device(device))
    out = np.empty_like(panels)
    for start in range(0, len(panels), batch):
        x = vae_training.to_tensor(panels[start : start + batch]).to(vae.device)
        with mixed(vae.device):
            latents = vae.encode(x).latent_dist.mode().float()
            error = torch.rand(len(x), 1, 1, 1, generator=rng) * torch.randn(latents.shape, generator=rng)
            y = vae.decode(latents + 0.25 * latents.std() * error.to(vae.device)).sample.float().cpu()
        out[start : start + batch] = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return out


def _truths(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plans = [renders.plan(n)[:2] for n in rows]
    labels = torch.tensor([[truth(*each) for each in zip(*plan, strict=True)] for plan in plans])
    return labels, *traits_table(subjects for subjects, _ in plans)


class JudgePairs:
    """A role's third of the rendered subject pairs: `panels` uint8 `[N, 2, H, W, 3]`, most of them as the VAE shows
    them, `same` bool `[N]`, and of each panel `labels` `[N, 2, groups]`, the subject's `numbers`
    `[N, 2, TRAITS]` and `choices` `[N, 2, 5]`."""

    def __init__(self, work: Path, role: str, count: int, device: str = "auto", processes: int = 1, report=print):
        panels, rows = renders.load(work / "pairs")
        own = range(list(SEEDS).index(role), len(rows), len(SEEDS))
        chosen = [n for n in own if rows[n]["task"] == "subject"][:count]
        path = work / "judges" / f"{role}-pairs-{len(chosen)}.npy"
        if not path.exists():
            drawn = np.concatenate([panels[n] for n in chosen])
            rng = torch.Generator().manual_seed(SEEDS[role])
            softened = torch.rand(len(drawn), generator=rng).numpy() < 0.6
            drawn[softened] = through_vae(work, drawn[softened], rng, device)
            with publish(path) as partial, partial.open("wb") as stream:
                np.save(stream, drawn.reshape(-1, 2, *drawn.shape[1:]))
            report(f"{len(chosen)} pairs for the {role}")
        self.panels = np.load(path, mmap_mode="r")
        self.same = torch.tensor([rows[n]["same"] for n in chosen])
        parts = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
        told = zip(*renders.spread(_truths, parts, processes), strict=True)
        self.labels, self.numbers, self.choices = (torch.cat(parts) for parts in told)

    def draw(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """Row numbers `[batch]`, sorted: half of them of one subject, half drifted."""
        halves = (np.flatnonzero(self.same), np.flatnonzero(~self.same))
        return np.sort(np.concatenate([rng.choice(half, batch // 2, replace=False) for half in halves]))


@torch.no_grad()
def measure(model, side: int, panels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Errors on held-out triplets: the chance that a true pair scores above a drifted one (AUC), the threshold of 95 %
    precision with its recall, and for the reader each attribute's accuracy."""
    parts = [
        outputs(model, enlarge(vae_training.to_tensor(block).to(model.device), side))
        for block in np.array_split(panels.reshape(-1, *panels.shape[2:]), 12)
    ]
    vectors = F.normalize(torch.cat([p[0] for p in parts]).cpu(), dim=1).view(len(panels), 3, -1)
    same, other = (vectors[:, 0] * vectors[:, 1]).sum(1), (vectors[:, 0] * vectors[:, 2]).sum(1)
    cosine, order = torch.cat([same, other]).sort(descending=True)
    right = (order < len(same)).cumsum(0)
    good = (right / torch.arange(1, len(order) + 1) >= 0.95).nonzero()
    last = int(good[-1]) if len(good) else 0
    result = {
        "auc_drifted": float((same[:, None] > other[None]).float().mean()),
        "same": float(same.mean()),
        "drifted": float(other.mean()),
        "threshold_95": float(cosine[last]),
        "recall_95": float(right[last] / len(same)) if len(good) else 0.0,
    }
    if read := [logits.cpu() for _, logits in parts if logits is not None]:
        logits, start = torch.cat(read), 0
        flat = torch.from_numpy(labels.reshape(-1, labels.shape[-1])).long()
        for column, (group, values) in enumerate(GROUPS.items()):
            result[group] = float((logits[:, start : start + len(values)].argmax(1) == flat[:, column]).float().mean())
            start += len(values)
    return {name: round(value, 4) for name, value in result.items()}


def begin(model, start: Path) -> torch.Tensor:
    """Load the judge in `start` into `model`, a label by its name. Returns which labels are new, bool `[labels]`: empty
    for a model without labels."""
    before = type(model).from_pretrained(start)
    weights, new = before.state_dict(), torch.zeros(0, dtype=torch.bool)
    if hasattr(before, "classifier"):
        rows = before.config.label2id
        new = torch.tensor([label not in rows for label in LABELS])
        for name in ("classifier.1.weight", "classifier.1.bias"):
            grown = model.state_dict()[name].clone()
            grown[~new] = weights[name][[rows[label] for label in LABELS if label in rows]]
            weights[name] = grown
    model.load_state_dict(weights)
    return new


@torch.no_grad()
def mix(model, other) -> None:
    """Put the mean of both models' weights into `model`."""
    others = other.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(others[name].to(tensor), 0.5)


def enlarge(x: torch.Tensor, side: int) -> torch.Tensor:
    """To `side`×`side`, as the shipped image processor does it: bilinear."""
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bilinear", antialias=True)


def train(
    work: Path,
    role: str,
    minutes: float,
    count: int = 15000,
    batch: int = 128,
    rate: float = 2e-3,
    start: Path | None = None,
    average: Path | None = None,
    only_new: bool = False,
    device: str = "auto",
    processes: int = 1,
    report=print,
) -> None:
    """Train `role`'s model for `minutes` and save its folder in `work/<role>`, with its held-out errors in the log.

    `start` holds judges (`start/<role>`) to begin from if the work folder has no state. The layer that reads their
    traits during training does not ship, so it starts from random weights.
    With `average`, the saved model is the mean with `average/<role>`: the mean of two trainings from one start is often
    better than either (model soups, arXiv 2203.05482).
    With `only_new`, only the reader's labels that `start` lacks are trained; whatever it could read stays equal to the
    bit.
    """
    from transformers import ViTImageProcessorPil

    torch.manual_seed(SEEDS[role])
    place = pick_device(device)
    pairs, side = JudgePairs(work, role, count, device, processes, report), INPUT[role]
    model: Any = make(role)
    new = begin(model, start / role) if start is not None else torch.zeros(0, dtype=torch.bool)
    model.train(not only_new).to(place, memory_format=torch.channels_last)
    known = {k: v.detach().clone() for k, v in model.named_parameters() if k.startswith("classifier")}
    if only_new:
        model.resnet.requires_grad_(False)
    width = IDENTITY if role == "reader" else model.config.hidden_sizes[-1]
    head = Head(width).to(place)
    trainer = Pretraining(work / f"{role}_training", {"model": model, "head": head}, rate, weight_decay=0.02, ema=0.99)
    if start is not None and trainer.step == 0:
        trainer.log(start=start.name)
    rng, generator = np.random.default_rng(trainer.step), torch.Generator(place).manual_seed(trainer.step)
    picked, labels, numbers, choices = (
        resident(of, place) for of in (pairs.panels, *(t.numpy() for t in (pairs.labels, pairs.numbers, pairs.choices)))
    )
    same, started, losses = pairs.same.to(place), time.monotonic(), []
    while (passed := (time.monotonic() - started) / 60) < minutes:
        pick = torch.from_numpy(pairs.draw(rng, batch)).to(place)
        x = degrade(vae_training.to_tensor(picked[pick].flatten(0, 1)), rng.uniform(0.4, 0.9), generator)
        x = enlarge(x, side).contiguous(memory_format=torch.channels_last)
        with mixed(place):
            vectors, logits = outputs(model, x)
        value = head.pair_loss(vectors[::2], vectors[1::2], same[pick])
        value = value + head.traits.loss(vectors, numbers[pick].flatten(0, 1), choices[pick].flatten(0, 1))
        if logits is not None:
            value = value + 2 * attribute_loss(logits, labels[pick].flatten(0, 1))
        trainer.update(value, scale=max(0.01, min(1.0, 1.6 * (1 - passed / minutes))))
        losses.append(value.detach())
        if trainer.step % 100 == 0:
            report(trainer.log(loss=round(mean(losses), 4), minutes=round(passed, 2)))
            trainer.save()
            losses.clear()
    trainer.save()
    model.eval()
    if only_new:
        with torch.no_grad():
            for name, before in known.items():
                model.get_parameter(name)[~new] = before[~new]
    if average is not None:
        mix(model, type(model).from_pretrained(average / role))
    errors = measure(model, side, *held_out(work, role, processes=processes, report=report))
    report(trainer.log(role=role, samples=trainer.step * batch * 2, averaged=average is not None, **errors))
    model.to(memory_format=torch.contiguous_format).save_pretrained(work / role)
    size = {"height": side, "width": side}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(work / role)
