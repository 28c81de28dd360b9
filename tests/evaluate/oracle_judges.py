"""Judges that know the truth: they look up the nearest known render and return its attributes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from diptych.evaluate import suites
from diptych.evaluate.scoring import quality, truth
from diptych.evaluate.suites import Known, Suite
from diptych.pocket import world


@dataclass(frozen=True)
class Reading:
    """As `judges.attributes` gives it."""

    values: dict[str, str]
    identity: np.ndarray
    probabilities: dict[str, Any] = field(default_factory=dict)


class Oracle:
    """Both judges in one: `embed`, `read` and `texture`."""

    def __init__(self, suite: Suite, identities: int, prompts: int, noise: float = 0.1) -> None:
        self.noise = noise
        self.thumbs: list[np.ndarray] = []
        self.truths: list[tuple[world.Identity, world.Scene]] = []
        for split in suite.splits:
            counts = (suite.calibration.identities if split == "identities" else suite.calibration.kinds,)
            for purpose, count in (("calibration", counts[0]), ("check", max(suite.check.identities, *counts))):
                for k in truth.known(suite, purpose, split, count):
                    self._learn(k.subject, k.reference)
                    self._learn(k.subject, k.target)
        for sample in suite.samples(identities, prompts):
            k = suite.of(sample)
            self._learn(k.subject, k.reference)
            self._learn(k.subject, k.target)
            other = world.sample_identity(suite.rng("suite", sample.split, sample.identity, 4), k.subject.kind)
            self._learn(other, k.target)
            rng = suite.rng("suite", sample.split, sample.identity, 5)
            for _ in range(quality.GALLERY - 1):
                self._learn(world.sample_identity(rng, k.subject.kind), k.reference)
        self._table = np.stack(self.thumbs)

    def _learn(self, subject: world.Identity, scene: world.Scene) -> None:
        self.thumbs.append(_thumb(suites.render(subject, scene)))
        self.truths.append((subject, scene))

    def _find(self, image: Image.Image) -> tuple[world.Identity, world.Scene]:
        return self.truths[int(np.abs(self._table - _thumb(image)).sum(1).argmin())]

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        """A direction for the kind, one for the identity, and a little noise that depends on the image."""
        rows = []
        for image in images:
            subject, _ = self._find(image)
            own = _direction(repr(subject)) + 0.5 * _direction(subject.kind)
            row = own + self.noise * _direction(_thumb(image).tobytes().hex())
            rows.append(row / np.linalg.norm(row))
        return np.stack(rows)

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """The true attributes of each render."""
        found = []
        for image, identity in zip(images, self.embed(images), strict=True):
            subject, scene = self._find(image)
            values = truth.attributes(Known(subject, scene, scene)) | world.traits(subject)
            found.append(Reading(values, identity))
        return found

    def texture(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Statistics of the pixels."""
        pixels = np.stack([np.asarray(image, float) for image in images])
        return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2))], 1)


def _thumb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float32).ravel()


def _direction(name: str) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    row = rng.standard_normal(64)
    return row / np.linalg.norm(row)
