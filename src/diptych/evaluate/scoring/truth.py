"""What renders can tell before any model is judged: the scale of the scores, and the judges' own errors.

A render's every attribute is known. So pairs of renders fix what "as like as the same subject" and "as unlike as
another of its kind" mean to the scoring judge, how near two true pictures of one subject come in pixels, how often the
attribute reader is right, and how well either judge tells the same subject from another. The renders that fix the
scale and those that measure errors are disjoint, and both are disjoint from the suite's own.
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
    """`count` subjects of a purpose, each in a reference scene and in a scene of one of the suite's levels in turn."""
    levels = suite.levels
    return [suite.known(split, i, levels[i % len(levels)], purpose=purpose) for i in range(count)]


def checked(suite: Suite, split: Split) -> list[Known]:
    """The subjects of a split that judges and curation are measured on."""
    return known(suite, "check", split, suite.check.identities if split == MAIN else suite.calibration.kinds)


def others(subjects: Sequence[Known]) -> list[int]:
    """For each subject the number of another of its kind (itself, where it is the only one)."""
    by_kind: dict[str, list[int]] = {}
    for i, k in enumerate(subjects):
        by_kind.setdefault(k.subject.kind, []).append(i)
    after = {i: same[(place + 1) % len(same)] for same in by_kind.values() for place, i in enumerate(same)}
    return [after[i] for i in range(len(subjects))]


def references(subjects: Sequence[Known]) -> list[Image]:
    return [render(k.subject, k.reference) for k in subjects]


def targets(subjects: Sequence[Known]) -> list[Image]:
    return [render(k.subject, k.target) for k in subjects]


def scale(suite: Suite, split: Split, embed: Embed) -> metrics.Scale:
    """The scale of one split's scores, from its calibration renders."""
    subjects = known(suite, "calibration", split, calibrating(suite, split))
    first, second = references(subjects), targets(subjects)
    a, b = embed(first), embed(second)
    pairs = [(i, j) for i, j in enumerate(others(subjects)) if i != j]
    different = [float(a[i] @ b[j]) for i, j in pairs]
    distances = metrics.copy_distances(first, second)
    return metrics.Scale(
        zero=float(np.mean(different)) if different else 0.0,
        one=float((a * b).sum(1).mean()),
        copy_distance=metrics.copy_threshold(distances),
        pairs=len(subjects),
    )


def copy_thresholds(suite: Suite) -> dict[str, float]:
    """The distance below which a picture is a copy, by split, as in `scale`; needs no judge."""
    found: dict[str, float] = {}
    for split in suite.splits:
        subjects = known(suite, "calibration", split, calibrating(suite, split))
        found[split] = metrics.copy_threshold(metrics.copy_distances(references(subjects), targets(subjects)))
    return found


def calibrating(suite: Suite, split: Split) -> int:
    """How many subjects fix the scale of a split."""
    return suite.calibration.identities if split == "identities" else suite.calibration.kinds


def check_pairs(suite: Suite, through: RoundTrip | None) -> RenderedPairs:
    """Pairs whose truth is known, as a teacher would show them: through its VAE if one is given, then blurred."""
    from PIL import ImageFilter

    from diptych.pocket import world

    subjects = checked(suite, MAIN)
    first, second = references(subjects), targets(subjects)
    drifted = []
    for i, k in enumerate(subjects):
        rng = suite.rng("check", "identities", i, 4)
        drifted.append(render(world.drift(rng, k.subject), k.target))

    def seen(images: list[Image]) -> list[Image]:
        if through is not None:
            images = through(images)
        return [i.filter(ImageFilter.GaussianBlur(suite.check.blur)) if suite.check.blur else i for i in images]

    first, second, drifted = seen(first), seen(second), seen(drifted)
    made: list[tuple[Image, Image, str, int]] = []
    for i, j in enumerate(others(subjects)):
        made += [(first[i], second[i], "same", i), (first[i], drifted[i], "drifted", i)]
        if i != j:
            made.append((first[i], second[j], "other", i))
    left, right, truth, identity = (list(column) for column in zip(*made, strict=True))
    return RenderedPairs(left, right, truth, weigh(truth, suite.check.prior), np.array(identity))


def judge_auc(suite: Suite, embed: Embed) -> dict[str, float]:
    """How well a judge tells the same subject from another of its kind, on clean check renders; by split."""
    result = {}
    for split in suite.splits:
        subjects = checked(suite, split)
        a, b = embed(references(subjects)), embed(targets(subjects))
        other = [float(a[i] @ b[j]) for i, j in enumerate(others(subjects)) if i != j]
        if other:
            result[split] = round(metrics.auc((a * b).sum(1), np.array(other)), 4)
    return result


def copy_rate(suite: Suite, threshold: float) -> dict[str, Any]:
    """How often true re-renders count as copies, on renders that took no part in setting the threshold."""
    subjects = checked(suite, MAIN)
    copied = metrics.copy_distances(references(subjects), targets(subjects)) < threshold
    rate = float(copied.mean())
    return {"n": len(copied), "copy_rate": round(rate, 4), "ci95": metrics.wilson(rate, len(copied))}


def reader_accuracy(suite: Suite, read: Read, through: RoundTrip | None = None) -> dict[str, dict[str, float]]:
    """How often the reader is right, by attribute group and split, on check renders (each through a VAE if given)."""
    result: dict[str, dict[str, float]] = {}
    for split in suite.splits:
        subjects = checked(suite, split)
        images = targets(subjects)
        readings = read(through(images) if through else images)
        hits: dict[str, list[bool]] = {}
        for k, reading in zip(subjects, readings, strict=True):
            for group, value in attributes(k).items():
                # Of a kind it was never told of, the reader cannot name the kind.
                if group in reading.values and (group != "kind" or suite.splits[split].kinds == "train"):
                    hits.setdefault(group, []).append(reading.values[group] == value)
        result[split] = {group: round(float(np.mean(values)), 4) for group, values in hits.items()}
    return result


def attributes(k: Known) -> dict[str, str]:
    """The truth of a target render, in the reader's groups."""
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
    """Pictures through a VAE and back, as 8-bit RGB: what a latent model can show of them at best."""
    import torch
    from PIL.Image import fromarray

    from diptych.student.canvas import to_pixels

    @torch.no_grad()
    def through(images: Sequence[Image]) -> list[Image]:
        decoded: list[Image] = []
        for start in range(0, len(images), batch):
            pixels = torch.stack([to_pixels(image) for image in images[start : start + batch]])
            pixels = pixels.to(vae.device, vae.dtype)
            out = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float().clamp(-1, 1)
            eight = ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            decoded += [fromarray(panel) for panel in eight]
        return decoded

    return through


def yardsticks(context: Context, opened: VisionModels, about: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The judges' own errors on renders, and what they say about curation. `about` says who the judges are."""
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
