"""Scenes to relight whose truth is known, and color baselines.

Each held-out scene is rendered under two lights: the first is the reference, the second the exact result of a perfect
relighting. A third of the samples change the direction, a third the color, a third both (and the strength).

Baselines in addition to `copy` and `text_only` (`baselines`):

- `colour_transfer`: Reinhard et al. 2001. The reference gets the mean and spread in lαβ of the requested light, as the
  average over renders of training subjects in that light.
- `colour_shift`: the same, but the statistics move by the mean *difference* that the requested light makes on such
  renders, so that a dark place stays dark. This is the limit of one color curve for the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.evaluate import suites
from diptych.evaluate.methods.common import Method
from diptych.evaluate.suites import MAIN, Known, Sample
from diptych.utils.io import sha256_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.pocket.world import Light

NAMESPACE = 8112027  # seed of every random choice here, which nothing else in diptych uses
LEVELS = ("direction", "colour", "both")
SCENES, FIT = 0, 1  # independent streams: scored scenes, and renders that color baselines are fitted on
FITTED = 24  # renders for each light
VERSION = 1


@dataclass(frozen=True)
class RelightSample(Sample):
    """One scene and one light. `prompt` describes both, `light` only the light."""

    light: str = field(kw_only=True)


class Scenes:
    """The suite of scenes to relight, for `generation.generate`."""

    name = "relight"
    version = VERSION

    def fingerprint(self) -> str:
        """sha256 over what decides the samples."""
        return sha256_json([self.name, self.version, NAMESPACE, LEVELS, FITTED])

    def samples(self, scenes: int) -> list[RelightSample]:
        """`scenes` held-out scenes, each under three other lights."""
        return [self._sample(number, place) for number in range(scenes) for place in range(len(LEVELS))]

    def _sample(self, number: int, place: int) -> RelightSample:
        from diptych.pocket import captions

        known = self.known(number, place)
        say = {"place": 1.0, "pose": 0.6, "prop": 0.7, "weather": 1.0, "light": 0.0, "framing": 0.0}
        light = captions.describe_light(known.target.light)
        rng = np.random.default_rng([NAMESPACE, SCENES, number, 2])
        room = captions.LONGEST - captions.count_words(light) - 1
        wordings = (captions.caption(known.subject.kind, known.reference, rng, say) for _ in range(100))
        scene = next(words for words in wordings if captions.count_words(words) <= room)
        before, after = known.reference.light, known.target.light
        changed = {"light": "direction", "colour": "colour", "intensity": "intensity"}
        return RelightSample(
            id=f"r{number:04d}-{LEVELS[place]}",
            split=MAIN,
            identity=number,
            kind=known.subject.kind,
            level=LEVELS[place],
            prompt=f"{scene}, {light}",
            grid_prompt="",
            asked={
                group: getattr(after, field)
                for group, field in changed.items()
                if getattr(after, field) != getattr(before, field)
            },
            light=light,
        )

    def known(self, number: int, place: int) -> Known:
        """The subject and both scenes of a sample. Kinds take turns."""
        from diptych.pocket import world

        rng = np.random.default_rng([NAMESPACE, SCENES, number, 0])
        subject = world.sample_identity(rng, world.TRAIN_KINDS[number % len(world.TRAIN_KINDS)])
        scene = world.sample_scene(rng)
        light = another(np.random.default_rng([NAMESPACE, SCENES, number, 1, place]), scene.light, LEVELS[place])
        return Known(subject, scene, replace(scene, light=light))

    def of(self, sample: Sample) -> Known:
        return self.known(sample.identity, LEVELS.index(sample.level))

    def reference_image(self, sample: Sample) -> Image:
        """The reference of a sample."""
        known = self.of(sample)
        return suites.render(known.subject, known.reference)

    def truth(self, sample: Sample) -> Image:
        """The same scene under the requested light."""
        known = self.of(sample)
        return suites.render(known.subject, known.target)


def another(rng: np.random.Generator, light: Light, level: str) -> Light:
    """A light that differs in direction, in color, or in both (and perhaps in strength), depending on `level`."""
    from diptych.pocket import world

    new = light
    if level != "colour":
        while new.direction == light.direction:
            new = world.sample_light(rng)
        if level == "direction":
            new = replace(new, colour=light.colour, intensity=light.intensity)
    if level != "direction":
        colours = [colour for colour in world.LIGHT_COLOURS if colour != light.colour]
        new = replace(new, colour=colours[int(rng.integers(len(colours)))])
    return new


# ---- color baselines

_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_OPPONENT = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
_FLOOR = 1 / 255


def to_opponent(pixels: np.ndarray) -> np.ndarray:
    """RGB (…, 3) in 0..1 to lαβ (Ruderman et al. 1998), in which Reinhard's transfer works."""
    return np.log10(np.maximum(pixels @ _LMS.T, _FLOOR)) @ _OPPONENT.T


def from_opponent(values: np.ndarray) -> np.ndarray:
    """The inverse of `to_opponent`, clipped to 0..1."""
    return np.clip(10 ** (values @ np.linalg.inv(_OPPONENT).T) @ np.linalg.inv(_LMS).T, 0, 1)


def statistics(image: Image) -> np.ndarray:
    """Mean and log spread (2, 3) of an image in lαβ."""
    values = to_opponent(np.asarray(image.convert("RGB"), dtype=np.float64) / 255).reshape(-1, 3)
    return np.stack([values.mean(0), np.log(values.std(0) + 1e-3)])


def moved(image: Image, target: np.ndarray) -> Image:
    """The image with the mean and spread in lαβ of `target`."""
    from PIL.Image import fromarray

    source = statistics(image)
    values = to_opponent(np.asarray(image.convert("RGB"), dtype=np.float64) / 255)
    values = (values - source[0]) * np.exp(target[1] - source[1]) + target[0]
    return fromarray((from_opponent(values) * 255).round().astype(np.uint8))


@cache
def light_statistics(direction: str, colour: str, intensity: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean statistics of training renders in this light, and their mean difference from the same scenes in another."""
    from diptych.pocket import world

    after, difference = [], []
    for number in range(FITTED):
        rng = np.random.default_rng([NAMESPACE, FIT, number])
        subject, scene = world.sample_identity(rng), world.sample_scene(rng)
        light = world.sample_light(rng)
        while light.direction != direction:
            light = world.sample_light(rng)
        light = replace(light, colour=colour, intensity=intensity)
        before = statistics(suites.render(subject, scene))
        after.append(statistics(suites.render(subject, replace(scene, light=light))))
        difference.append(after[-1] - before)
    return np.mean(after, 0), np.mean(difference, 0)


class ColorTransfer(Method):
    """Reinhard's transfer; `relative` moves by the mean difference and not to the mean."""

    def __init__(self, suite: Scenes, relative: bool) -> None:
        self.suite, self.relative = suite, relative

    def fingerprint(self) -> str:
        return f"colour transfer, {'relative' if self.relative else 'absolute'}, {FITTED}"

    def generate(self, references: Sequence[Image], samples: Sequence[Any], seeds: Sequence[int]) -> Sequence[Image]:
        images = []
        for reference, sample in zip(references, samples, strict=True):
            light = self.suite.of(sample).target.light  # only what the prompt names: direction, color, strength
            mean, difference = light_statistics(light.direction, light.colour, light.intensity)
            images.append(moved(reference, statistics(reference) + difference if self.relative else mean))
        return images
