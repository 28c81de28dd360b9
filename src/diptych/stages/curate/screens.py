"""Screens: tests of a single panel, for black, empty or blurred images and unwanted content.

    scores(panels, classifiers)      # [{"dark": 0.83, "flat": 0.21, "blur": 0.034, "nsfw": 0.02}, …]

The first three are computed with numpy. The others are the image classifiers and detectors that the recipe names
(`curate.screens.classifiers`), usually for text in the image or nudity. Scores are rounded before they are tested, so
that a test of the stored scores gives the same verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diptych.errors import UsageError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.judges.detectors import Measure
    from diptych.judges.vision import Vision
    from diptych.recipe.schema import Classifier

DIGITS = 6
SIDE = 256  # pixels: larger panels are reduced to it, so that panels of 512 and 1024 pixels have equal scores
BRIGHTEST = 95  # percentile
GRAY = (0.299, 0.587, 0.114)  # Rec. 601, as in Pillow
NOISE = 0.40625  # variance of white noise of variance 1 after smoothing and the Laplacian
FLOOR = (1 / 255) ** 2  # variance of the last bit of 8; less contrast counts as none
_BOX = 4  # Pillow's resampling filter; only callers with an image import Pillow


class PanelScreen(Protocol):
    """A model that gives each panel a score, 0 to 1, high for panels to reject."""

    @property
    def name(self) -> str: ...

    def scores(self, panels: Sequence[Image]) -> list[float]: ...


def load(settings: Classifier, device: str = "cpu") -> PanelScreen:
    """Open a detector, or a classifier's folder or hub name.

    Raises UsageError for an unknown label or a detector that is not installed, UserError if the model is incomplete.
    """
    from diptych.judges.detectors import DETECTORS

    return (PanelDetector if settings.model in DETECTORS else PanelClassifier).load(settings, device)


def check(settings: Classifier) -> None:
    """Raise the UsageError or UserError of `load`, without reading weights."""
    from diptych.judges.detectors import DETECTORS

    (PanelDetector if settings.model in DETECTORS else PanelClassifier).check(settings)


def fingerprint(model: str) -> str:
    """Return the hash of the weights of a detector, or of a classifier's folder or hub name."""
    from diptych.judges.detectors import DETECTORS
    from diptych.utils import models

    if model in DETECTORS:
        return DETECTORS[model].fingerprint()
    return models.fingerprint(models.resolve(model, "screen"))


def scores(panels: Sequence[Image], classifiers: Sequence[PanelScreen] = ()) -> list[dict[str, float]]:
    """Return the scores of each panel by the screens' names."""
    results = [measure(panel) for panel in panels]
    for classifier in classifiers:
        for result, score in zip(results, classifier.scores(panels), strict=True):
            result[classifier.name] = score
    return results


def measure(panel: Image) -> dict[str, float]:
    """Return `dark`, `flat` and `blur` of a panel, each 0 to 1 and low for bad panels (see `recipe.Screens`).

    They are computed at 256 pixels a side at most; a smaller panel is not enlarged.
    """
    size = (min(panel.width, SIDE), min(panel.height, SIDE))
    colors = np.asarray(panel.convert("RGB").resize(size, _BOX), dtype=np.float64) / 255
    gray = colors @ np.array(GRAY)
    values = {"dark": np.percentile(gray, BRIGHTEST), "flat": np.sqrt(colors.var((0, 1)).mean()), "blur": sharp(gray)}
    return {name: round(float(value), DIGITS) for name, value in values.items()}


def sharp(gray: np.ndarray) -> float:
    """Return the sharpness of brightness (H, W), 0..1: the variance of the Laplacian relative to the image's variance.

    1 is white noise and 0 an image without an edge. It does not depend on contrast. The image is slightly smoothed
    first ([1 2 1] / 4 along both sides), so that the rounding of pixels to 8 bits does not count as edges.
    """
    if min(gray.shape) < 5:
        return 0.0
    variance = gray.var() + FLOOR
    gray = 0.5 * gray[1:-1] + 0.25 * (gray[:-2] + gray[2:])
    gray = 0.5 * gray[:, 1:-1] + 0.25 * (gray[:, :-2] + gray[:, 2:])
    middle = gray[1:-1, 1:-1]
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return min(1.0, float((around - 4 * middle).var() / (NOISE * variance)))


@dataclass(frozen=True)
class PanelClassifier:
    """An image classifier, used for one of its labels."""

    name: str
    vision: Vision
    label: int  # its index among the model's labels
    alone: bool  # whether each label has an independent probability, so that they do not sum to 1

    @classmethod
    def load(cls, settings: Classifier, device: str = "cpu") -> PanelClassifier:
        """Open a folder or a hub name.

        Raises UsageError for an unknown label, UserError if the model is incomplete.
        """
        from diptych.judges.vision import open_vision, refuse_missing

        vision = open_vision(settings.model, "screen", "AutoModelForImageClassification", device)
        refuse_missing(sorted(vision.missing), settings.model)
        config = vision.model.config
        labels = {str(label): int(number) for number, label in config.id2label.items()}
        alone = config.problem_type == "multi_label_classification" or len(config.id2label) == 1
        return cls(settings.name, vision, labels[_label(settings, labels)], alone)

    @staticmethod
    def check(settings: Classifier) -> None:
        """Raise the UsageError or UserError of `load` for the model and its label, without reading weights."""
        from diptych.judges import vision

        config = vision.check(settings.model, "screen", "AutoModelForImageClassification")
        _label(settings, [str(label) for label in config.id2label.values()])

    def scores(self, panels: Sequence[Image]) -> list[float]:
        """Return the label's probability for each panel, in order, computed in batches of 32."""
        results: list[float] = []
        for pixels in self.vision.batches(panels):
            logits = self.vision.model(pixel_values=pixels).logits.float()  # (B, labels)
            shares = logits.sigmoid() if self.alone else logits.softmax(1)
            results += [round(float(share), DIGITS) for share in shares[:, self.label]]
        return results


@dataclass(frozen=True)
class PanelDetector:
    """A detector (`judges.detectors`), used for one of its labels."""

    name: str
    measure: Measure

    @classmethod
    def load(cls, settings: Classifier, device: str = "cpu") -> PanelDetector:
        """Open an installed detector, which always runs on the CPU. Raises the UsageError of `check`."""
        import torch

        from diptych.judges.detectors import DETECTORS

        cls.check(settings)
        return cls(settings.name, DETECTORS[settings.model].open(settings.label, torch.get_num_threads()))

    @staticmethod
    def check(settings: Classifier) -> None:
        """Raise UsageError for a detector that is not installed or does not have the label."""
        from diptych.judges.detectors import DETECTORS

        detector = DETECTORS[settings.model]
        detector.folder()
        _label(settings, detector.labels)

    def scores(self, panels: Sequence[Image]) -> list[float]:
        """Return the detector's confidence for each panel, in order."""
        from diptych.judges.detectors import score

        return [round(score(self.measure, panel), DIGITS) for panel in panels]


def _label(settings: Classifier, labels: Sequence[str] | Mapping[str, int]) -> str:
    """Return the label of a classifier if its model has it. Raises UsageError if not."""
    if settings.label not in labels:
        shown = ", ".join(list(labels)[:12]) + (", …" if len(labels) > 12 else "")
        raise UsageError(
            "name_unknown",
            f"curate.screens.classifiers {settings.name}: the model '{settings.model}' has no label "
            f"'{settings.label}'. Its labels: {shown}{nearest(settings.label, labels)}",
        )
    return settings.label
