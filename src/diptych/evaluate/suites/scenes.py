"""Scenes to relight of which the truth is known, and the baselines that need no student.

The renderer draws a held-out scene under two lights: the first is the reference, the second what a perfect relighting
gives, to the pixel. A third of the wishes change the direction, a third the colour, a third both (and the strength).

Baselines beside `copy` and `text_only` (`baselines`):

- `colour_transfer`: Reinhard et al. 2001, the reference's mean and spread in lαβ made those of the asked light, as
  averaged over renders of training subjects in that light.
- `colour_shift`: the same, but moved by the mean *difference* that the asked light makes on such renders, so that a
  dark place stays dark: what one colour curve for the whole picture can know from the words.
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

NAMESPACE = 8112027  # of every random choice here; nothing else in diptych draws from it
LEVELS = ("direction", "colour", "both")
SCENES, FIT = 0, 1  # independent streams: what is scored, and what colour baselines are fitted on
FITTED = 24  # renders for each light
VERSION = 1


@dataclass(frozen=True)
class Wish(Sample):
    """One scene and one light. `prompt` says both, `light` the light alone."""

    light: str = field(kw_only=True)


class Scenes:
    """The suite: what `drawing.generate` draws for."""

    name = "relight"
    version = VERSION

    def fingerprint(self) -> str:
        """sha256 over what decides the wishes."""
        return sha256_json([self.name, self.version, NAMESPACE, LEVELS, FITTED])

    def samples(self, scenes: int) -> list[Wish]:
        """`scenes` held-out scenes, each under three other lights."""
        return [self._wish(number, place) for number in range(scenes) for place in range(len(LEVELS))]

    def _wish(self, number: int, place: int) -> Wish:
        from diptych.pocket import captions

        known = self.known(number, place)
        say = {"place": 1.0, "pose": 0.6, "prop": 0.7, "weather": 1.0, "light": 0.0, "framing": 0.0}
        light = captions.describe_light(known.target.light)
        rng = np.random.default_rng([NAMESPACE, SCENES, number, 2])
        room = captions.LONGEST - captions.count_words(light) - 1
        told = (captions.caption(known.subject.kind, known.reference, rng, say) for _ in range(100))
        scene = next(words for words in told if captions.count_words(words) <= room)
        before, after = known.reference.light, known.target.light
        changed = {"light": "direction", "colour": "colour", "intensity": "intensity"}
        return Wish(
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
        """Everything of a wish. Kinds take turns."""
        from diptych.pocket import world

        rng = np.random.default_rng([NAMESPACE, SCENES, number, 0])
        subject = world.sample_identity(rng, world.TRAIN_KINDS[number % len(world.TRAIN_KINDS)])
        scene = world.sample_scene(rng)
        light = another(np.random.default_rng([NAMESPACE, SCENES, number, 1, place]), scene.light, LEVELS[place])
        return Known(subject, scene, replace(scene, light=light))

    def of(self, sample: Sample) -> Known:
        return self.known(sample.identity, LEVELS.index(sample.level))

    def picture(self, sample: Sample) -> Image:
        """The reference."""
        known = self.of(sample)
        return suites.render(known.subject, known.reference)

    def truth(self, sample: Sample) -> Image:
        """The same scene under the asked light."""
        known = self.of(sample)
        return suites.render(known.subject, known.target)


def another(rng: np.random.Generator, light: Light, level: str) -> Light:
    """A light that differs in what `level` says: in direction, in colour, or in both and perhaps in strength."""
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


# ---- colour baselines

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
    """Mean and log spread (2, 3) of a picture in lαβ."""
    values = to_opponent(np.asarray(image.convert("RGB"), dtype=np.float64) / 255).reshape(-1, 3)
    return np.stack([values.mean(0), np.log(values.std(0) + 1e-3)])


def moved(image: Image, target: np.ndarray) -> Image:
    """The picture with its mean and spread in lαβ made those of `target`."""
    from PIL.Image import fromarray

    own = statistics(image)
    values = to_opponent(np.asarray(image.convert("RGB"), dtype=np.float64) / 255)
    values = (values - own[0]) * np.exp(target[1] - own[1]) + target[0]
    return fromarray((from_opponent(values) * 255).round().astype(np.uint8))


@cache
def light_statistics(direction: str, colour: str, intensity: str) -> tuple[np.ndarray, np.ndarray]:
    """Of training renders in this light: their mean statistics, and the mean difference to those before it."""
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


class ColourTransfer(Method):
    """Reinhard's transfer; `relative` moves by the mean difference, not to the mean."""

    def __init__(self, suite: Scenes, relative: bool) -> None:
        self.suite, self.relative = suite, relative

    def fingerprint(self) -> str:
        return f"colour transfer, {'relative' if self.relative else 'absolute'}, {FITTED}"

    def generate(self, references: Sequence[Image], samples: Sequence[Any], seeds: Sequence[int]) -> Sequence[Image]:
        pictures = []
        for reference, sample in zip(references, samples, strict=True):
            light = self.suite.of(sample).target.light  # what its words say: direction, colour, strength
            mean, difference = light_statistics(light.direction, light.colour, light.intensity)
            pictures.append(moved(reference, statistics(reference) + difference if self.relative else mean))
        return pictures
