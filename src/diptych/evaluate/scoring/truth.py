"""Measurements on renders, whose every attribute is known: the scale of the scores, and the judges' errors.

Pairs of renders fix the scoring judge's similarity for one subject and for different subjects of a kind, and the pixel
distance between true images of one subject. They also measure the accuracy of the attribute reader, and how well each
judge separates one subject from others. The renders for the scale, those for the errors, and those of the suite are
disjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.evaluate.scoring import curation, metrics
from diptych.evaluate.scoring.curation import Embed, RenderedPairs, weigh
from diptych.evaluate.suites import MAIN, Known, Split, Suite, render
from diptych.recipe import tasks

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.evaluate.methods.common import Context
    from diptych.evaluate.scoring.judging import VisionModels

Read = Callable[[Sequence["Image"]], list[Any]]
RoundTrip = Callable[[Sequence["Image"]], list["Image"]]


def known(suite: Suite, purpose: str, split: Split, count: int) -> list[Known]:
    """`count` subjects for a purpose, each in a reference scene and in a scene of one of the suite's levels in turn."""
    levels = suite.levels
    return [suite.known(split, i, levels[i % len(levels)], purpose=purpose) for i in range(count)]


def checked(suite: Suite, split: Split) -> list[Known]:
    """The subjects of a split for measuring judges and curation."""
    return known(suite, "check", split, suite.check.identities if split == MAIN else suite.calibration.kinds)


def others(subjects: Sequence[Known]) -> list[int]:
    """For each subject, the number of another of its kind, or its number if it is the only one."""
    by_kind: dict[str, list[int]] = {}
    for i, k in enumerate(subjects):
        by_kind.setdefault(k.subject.kind, []).append(i)
    after = {i: same[(place + 1) % len(same)] for same in by_kind.values() for place, i in enumerate(same)}
    return [after[i] for i in range(len(subjects))]


def references(subjects: Sequence[Known]) -> list[Image]:
    """The renders of the reference scenes."""
    return [render(k.subject, k.reference) for k in subjects]


def targets(subjects: Sequence[Known]) -> list[Image]:
    """The renders of the target scenes."""
    return [render(k.subject, k.target) for k in subjects]


def scale(suite: Suite, split: Split, embed: Embed) -> metrics.Scale:
    """The scale of one split's scores, from its calibration renders."""
    subjects = calibrating(suite, split)
    a, b = embed(references(subjects)), embed(targets(subjects))
    different = [float(a[i] @ b[j]) for i, j in enumerate(others(subjects)) if i != j]
    return metrics.Scale(
        zero=float(np.mean(different)) if different else 0.0,
        one=float((a * b).sum(1).mean()),
        copy_distance=copy_threshold(suite, split),
        pairs=len(subjects),
    )


def copy_threshold(suite: Suite, split: Split) -> float:
    """The distance below which an image of a split is a copy."""
    subjects = calibrating(suite, split)
    return metrics.copy_threshold(metrics.copy_distances(references(subjects), targets(subjects)))


def calibrating(suite: Suite, split: Split) -> list[Known]:
    """The subjects that fix the scale of a split."""
    count = suite.calibration.identities if split == "identities" else suite.calibration.kinds
    return known(suite, "calibration", split, count)


def check_pairs(suite: Suite, through: RoundTrip | None) -> RenderedPairs:
    """Pairs of known truth as a teacher would show them: through its VAE if there is one, then blurred."""
    from PIL import ImageFilter

    from diptych.pocket import world

    subjects = checked(suite, MAIN)
    rngs = [suite.rng("check", "identities", i, 4) for i in range(len(subjects))]
    drifted = [render(world.drift(rng, k.subject), k.target) for rng, k in zip(rngs, subjects, strict=True)]

    def degrade(images: list[Image]) -> list[Image]:
        if through is not None:
            images = through(images)
        return [i.filter(ImageFilter.GaussianBlur(suite.check.blur)) if suite.check.blur else i for i in images]

    first, second, drifted = degrade(references(subjects)), degrade(targets(subjects)), degrade(drifted)
    pairs: list[tuple[Image, Image, str, int]] = []
    for i, j in enumerate(others(subjects)):
        pairs += [(first[i], second[i], "same", i), (first[i], drifted[i], "drifted", i)]
        if i != j:
            pairs.append((first[i], second[j], "other", i))
    left, right, truth, identity = (list(column) for column in zip(*pairs, strict=True))
    return RenderedPairs(left, right, truth, weigh(truth, suite.check.prior), np.array(identity))


def judge_auc(suite: Suite, embed: Embed) -> dict[str, float]:
    """How well a judge separates the same subject from another of its kind, on clean check renders, by split."""
    result = {}
    for split in suite.splits:
        subjects = checked(suite, split)
        a, b = embed(references(subjects)), embed(targets(subjects))
        other = [float(a[i] @ b[j]) for i, j in enumerate(others(subjects)) if i != j]
        if other:
            result[split] = round(metrics.auc((a * b).sum(1), np.array(other)), 4)
    return result


def copy_rate(suite: Suite, threshold: float) -> dict[str, Any]:
    """How often true re-renders count as copies, on renders that did not set the threshold."""
    subjects = checked(suite, MAIN)
    copied = metrics.copy_distances(references(subjects), targets(subjects)) < threshold
    rate = float(copied.mean())
    return {"n": len(copied), "copy_rate": round(rate, 4), "ci95": metrics.wilson(rate, len(copied))}


def reader_accuracy(suite: Suite, read: Read, through: RoundTrip | None = None) -> dict[str, dict[str, float]]:
    """The reader's accuracy by split and attribute group, on check renders, which go through a VAE if one is given."""
    result: dict[str, dict[str, float]] = {}
    for split in suite.splits:
        subjects = checked(suite, split)
        images = targets(subjects)
        readings = read(through(images) if through else images)
        hits: dict[str, list[bool]] = {}
        for k, reading in zip(subjects, readings, strict=True):
            for group, value in attributes(k).items():
                # The reader cannot name a held-out kind.
                if group in reading.values and (group != "kind" or suite.splits[split].kinds == "train"):
                    hits.setdefault(group, []).append(reading.values[group] == value)
        result[split] = {group: round(float(np.mean(values)), 4) for group, values in hits.items()}
    return result


def attributes(k: Known) -> dict[str, str]:
    """The true attributes of a target render, by the reader's groups."""
    scene = k.target
    light = scene.light
    return {
        "kind": k.subject.kind,
        "place": scene.place,
        "light": light.direction,
        "colour": light.colour,
        "intensity": light.intensity,
        "pose": scene.pose,
        "prop": scene.prop,
        "framing": scene.framing,
        "weather": scene.weather,
    }


def round_trip(vae: Any, batch: int = 32) -> RoundTrip:
    """A function that encodes and decodes images with a VAE, to 8-bit RGB: the limit of any latent model."""
    import torch
    from PIL.Image import fromarray

    from diptych.student.canvas import to_pixels

    video = "temperal_downsample" in vae.config  # Qwen-Image's, whose images are single frames

    @torch.no_grad()
    def through(images: Sequence[Image]) -> list[Image]:
        decoded: list[Image] = []
        for start in range(0, len(images), batch):
            pixels = torch.stack([to_pixels(image) for image in images[start : start + batch]])
            pixels = pixels.to(vae.device, vae.dtype)
            pixels = pixels[:, :, None] if video else pixels
            out = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float().clamp(-1, 1)
            out = out[:, :, 0] if video else out
            eight = ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            decoded += [fromarray(panel) for panel in eight]
        return decoded

    return through


def yardsticks(context: Context, opened: VisionModels, about: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The judges' errors on renders, and the quality of curation. `about` has the judges' names and fingerprints."""
    suite, recipe = context.suite, context.recipe
    through = round_trip(context.teacher().vae)
    scorer, curator = opened.embed(recipe.evaluate.scorer), opened.embed(recipe.curate.judge, "curator")
    read = opened.reader(recipe.evaluate.reader).read
    judges: dict[str, dict[str, Any]] = {role: dict(known) for role, known in about.items()}
    judges["scorer"]["auc"] = judge_auc(suite, scorer)
    judges["curator"]["auc"] = judge_auc(suite, curator)
    judges["reader"]["accuracy"] = reader_accuracy(suite, read)
    judges["reader"]["accuracy_through_vae"] = reader_accuracy(suite, read, through)
    pairs = check_pairs(suite, through)

    def identify(images: Sequence[Any]) -> np.ndarray:
        return np.stack([reading.identity for reading in read(list(images))])

    witness = curation.witness(pairs, identify)
    limits = tasks.load(recipe.task).thresholds(recipe.curate.thresholds)
    curated = curation.on_renders(pairs, curator, limits)
    return {
        "judges": judges,
        "curation": {"renders": curated, "grids": curation.on_grids(context.run_dir, identify, witness)},
    }
