"""Screens: tests of one panel alone. Is it black, is it empty, is it out of focus, is there something no one wants?

    scores(panels, classifiers)      # [{"dark": 0.83, "flat": 0.21, "blur": 0.034, "nsfw": 0.02}, …]

The first three are a few lines of numpy; the others are whatever image classifiers the recipe names
(`curate.screens.classifiers`), writing in the picture or nudity being the usual ones. Scores are rounded before anybody
looks at them, so that a verdict from the stored ones is the same verdict.
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
SIDE = 256  # pixels: a panel is looked at no larger, so that 512 and 1024 mean the same
BRIGHTEST = 95  # percentile
GREY = (0.299, 0.587, 0.114)  # Rec. 601, as Pillow's
NOISE = 0.40625  # variance of white noise of variance 1, smoothed and through the Laplacian
FLOOR = (1 / 255) ** 2  # variance of the last bit of 8: less contrast is none
_BOX = 4  # Pillow's resampling filter, whose import is left to whoever has an image


def scores(panels: Sequence[Image], classifiers: Sequence[PanelClassifier] = ()) -> list[dict[str, float]]:
    """Every screen's score of each panel, by the screen's name."""
    found = [measure(panel) for panel in panels]
    for classifier in classifiers:
        for own, score in zip(found, classifier.scores(panels), strict=True):
            own[classifier.name] = score
    return found


def measure(panel: Image) -> dict[str, float]:
    """`dark`, `flat` and `blur` of a panel, each 0 to 1 and low where it is bad; their meaning is in `recipe.Screens`.

    Computed at no more than 256 pixels a side; a smaller panel is not enlarged.
    """
    size = (min(panel.width, SIDE), min(panel.height, SIDE))
    colours = np.asarray(panel.convert("RGB").resize(size, _BOX), dtype=np.float64) / 255
    grey = colours @ np.array(GREY)
    found = {"dark": np.percentile(grey, BRIGHTEST), "flat": np.sqrt(colours.var((0, 1)).mean()), "blur": sharp(grey)}
    return {name: round(float(value), DIGITS) for name, value in found.items()}


def sharp(grey: np.ndarray) -> float:
    """Sharpness of brightness (H, W) in 0..1: variance of the Laplacian, in terms of the picture's own variance.

    1 is white noise, 0 a picture without an edge; half the contrast gives the same number. Smoothed a little first
    ([1 2 1] / 4 along both sides), so that the rounding of pixels to 8 bits is not taken for edges.
    """
    if min(grey.shape) < 5:
        return 0.0
    own = grey.var() + FLOOR
    grey = 0.5 * grey[1:-1] + 0.25 * (grey[:-2] + grey[2:])
    grey = 0.5 * grey[:, 1:-1] + 0.25 * (grey[:, :-2] + grey[:, 2:])
    middle = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return min(1.0, float((around - 4 * middle).var() / (NOISE * own)))


@dataclass(frozen=True)
class PanelClassifier:
    """An image classifier that looks for one of its labels."""

    name: str
    vision: Vision
    label: int  # its place among the model's labels
    alone: bool  # each label has a probability of its own, and they do not sum to 1

    @classmethod
    def load(cls, settings: Classifier, device: str = "cpu") -> PanelClassifier:
        """Opens a folder or a hub name. UsageError for a label it has not, UserError if the model is not whole."""
        from diptych.judges.vision import open_vision, refuse_missing

        vision = open_vision(settings.model, "screen", "AutoModelForImageClassification", device)
        refuse_missing(sorted(vision.missing), settings.model)
        config = vision.model.config
        alone = config.problem_type == "multi_label_classification" or len(config.id2label) == 1
        return cls(settings.name, vision, _label(settings, config), alone)

    @staticmethod
    def check(settings: Classifier) -> None:
        """UsageError or UserError if `load` would not find the model and its label. Reads no weights."""
        from diptych.judges import vision

        _label(settings, vision.check(settings.model, "screen", "AutoModelForImageClassification"))

    def scores(self, panels: Sequence[Image]) -> list[float]:
        """The label's probability for each panel, in batches of 32, in order."""
        found: list[float] = []
        for pixels in self.vision.batches(panels):
            logits = self.vision.model(pixel_values=pixels).logits.float()  # (B, labels)
            shares = logits.sigmoid() if self.alone else logits.softmax(1)
            found += [round(float(share), DIGITS) for share in shares[:, self.label]]
        return found


def _label(settings: Classifier, config: Any) -> int:
    """The place of a classifier's label among its model's. UsageError if it has none of that name."""
    labels = {str(label): int(number) for number, label in config.id2label.items()}
    if settings.label not in labels:
        shown = ", ".join(list(labels)[:12]) + (", …" if len(labels) > 12 else "")
        raise UsageError(
            f"curate.screens.classifiers {settings.name}: the model '{settings.model}' has no label "
            f"'{settings.label}'; it has {shown}{nearest(settings.label, labels)}"
        )
    return labels[settings.label]
