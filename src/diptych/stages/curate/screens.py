"""Screens: tests of a single panel, for black, empty or blurred images and unwanted content.

    scores(panels, classifiers)      # [{"dark": 0.83, "flat": 0.21, "blur": 0.034, "nsfw": 0.02}, …]

The first three are computed with numpy. The others are the image classifiers that the recipe names
(`curate.screens.classifiers`), usually for text in the image or nudity. Scores are rounded before they are tested, so
that a test of the stored scores gives the same verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.errors import UsageError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

    from diptych.judges.vision import Vision
    from diptych.recipe.schema import Classifier

DIGITS = 6
SIDE = 256  # pixels: larger panels are reduced to it, so that panels of 512 and 1024 pixels have equal scores
BRIGHTEST = 95  # percentile
GRAY = (0.299, 0.587, 0.114)  # Rec. 601, as in Pillow
NOISE = 0.40625  # variance of white noise of variance 1 after smoothing and the Laplacian
FLOOR = (1 / 255) ** 2  # variance of the last bit of 8; less contrast counts as none
_BOX = 4  # Pillow's resampling filter; only callers with an image import Pillow


def scores(panels: Sequence[Image], classifiers: Sequence[PanelClassifier] = ()) -> list[dict[str, float]]:
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
        alone = config.problem_type == "multi_label_classification" or len(config.id2label) == 1
        return cls(settings.name, vision, _label(settings, config), alone)

    @staticmethod
    def check(settings: Classifier) -> None:
        """Raise the UsageError or UserError of `load` for the model and its label, without reading weights."""
        from diptych.judges import vision

        _label(settings, vision.check(settings.model, "screen", "AutoModelForImageClassification"))

    def scores(self, panels: Sequence[Image]) -> list[float]:
        """Return the label's probability for each panel, in order, computed in batches of 32."""
        results: list[float] = []
        for pixels in self.vision.batches(panels):
            logits = self.vision.model(pixel_values=pixels).logits.float()  # (B, labels)
            shares = logits.sigmoid() if self.alone else logits.softmax(1)
            results += [round(float(share), DIGITS) for share in shares[:, self.label]]
        return results


def _label(settings: Classifier, config: Any) -> int:
    """Return the index of a classifier's label among its model's. Raises UsageError for an unknown label."""
    labels = {str(label): int(number) for number, label in config.id2label.items()}
    if settings.label not in labels:
        shown = ", ".join(list(labels)[:12]) + (", …" if len(labels) > 12 else "")
        raise UsageError(
            "name_unknown",
            f"curate.screens.classifiers {settings.name}: the model '{settings.model}' has no label "
            f"'{settings.label}'. Its labels: {shown}{nearest(settings.label, labels)}",
        )
    return labels[settings.label]
