"""Reads what an image shows (place, light, pose, kind, …) and an identity embedding of its subject.

The reader is a stock image classifier with labels `group:value` ("place:beach") and a softmax within each group. The
labels `identity:0`, `identity:1`, … are not classes but the coordinates of an identity embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diptych.errors import UserError
from diptych.judges.vision import Vision, check, open_vision, refuse_missing

if TYPE_CHECKING:
    from PIL.Image import Image

IDENTITY = "identity"


@dataclass(frozen=True)
class Reading:
    """What one image shows: the likeliest value of each group, its probability, and the identity embedding (norm 1)."""

    values: dict[str, str]
    probabilities: dict[str, float]
    identity: np.ndarray


@dataclass(frozen=True)
class AttributeReader:
    """Reads images. `groups` has the values of each group, and `columns` their logits."""

    vision: Vision
    groups: dict[str, tuple[str, ...]]
    columns: dict[str, list[int]]

    @classmethod
    def load(cls, name: str = "pocket", device: str = "cpu") -> AttributeReader:
        """Loads `pocket`, a folder, or a hub name. UserError if weights are missing or labels are not `group:value`."""
        vision = open_vision(name, "reader", "AutoModelForImageClassification", device)
        refuse_missing(sorted(vision.missing), name)
        groups, columns = label_groups(vision.model.config.id2label, name)
        return cls(vision, groups, columns)

    @staticmethod
    def check(name: str) -> None:
        """UserError if `load` would fail. Reads no weights."""
        label_groups(check(name, "reader", "AutoModelForImageClassification").id2label, name)

    @property
    def fingerprint(self) -> str:
        """sha256 of the model's files."""
        return self.vision.fingerprint

    def read(self, images: Sequence[Image]) -> list[Reading]:
        """Returns a reading for each image, in order, computed in batches of 32."""
        readings: list[Reading] = []
        for pixels in self.vision.batches(images):
            readings += self._read(self.vision.model(pixel_values=pixels).logits.double().cpu().numpy())
        return readings

    def texture(self, images: Sequence[Image]) -> np.ndarray:
        """The mean and the standard deviation of each channel of the first feature map, float64 [N, 2 D]."""
        rows = []
        for pixels in self.vision.batches(images):
            first = self.vision.model(pixel_values=pixels, output_hidden_states=True).hidden_states[0].double()
            rows.append(np.concatenate([first.mean((2, 3)).cpu().numpy(), first.std((2, 3)).cpu().numpy()], 1))
        return np.concatenate(rows)

    def _read(self, logits: np.ndarray) -> list[Reading]:
        """Readings of logits (B, labels)."""
        values: list[dict[str, str]] = [{} for _ in logits]
        probabilities: list[dict[str, float]] = [{} for _ in logits]
        for group, names in self.groups.items():
            part = logits[:, self.columns[group]]
            chances = np.exp(part - part.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            for row, best in enumerate(chances.argmax(1)):
                values[row][group] = names[best]
                probabilities[row][group] = float(chances[row, best])
        identity = logits[:, self.columns.get(IDENTITY, [])]
        identity = identity / np.maximum(np.linalg.norm(identity, axis=1, keepdims=True), 1e-12)
        return [Reading(*parts) for parts in zip(values, probabilities, identity.astype(np.float32), strict=True)]


def label_groups(id2label: dict[int, str], name: str) -> tuple[dict[str, tuple[str, ...]], dict[str, list[int]]]:
    """The values and columns of each group; the identity's columns are in the order of its coordinates."""
    groups: dict[str, list[str]] = {}
    columns: dict[str, list[int]] = {}
    for column, label in sorted((int(i), label) for i, label in id2label.items()):
        group, colon, value = label.partition(":")
        if not colon or not group or not value:
            message = f"'{name}' is not an attribute reader: its label '{label}' does not have the form group:value."
            raise UserError("judge_invalid", message)
        groups.setdefault(group, []).append(value)
        columns.setdefault(group, []).append(column)
    if IDENTITY in groups:
        try:
            order = sorted(range(len(columns[IDENTITY])), key=lambda i: int(groups[IDENTITY][i]))
        except ValueError as error:
            message = f"'{name}' is not an attribute reader: its identity labels are not numbers."
            raise UserError("judge_invalid", message) from error
        columns[IDENTITY] = [columns[IDENTITY][i] for i in order]
        del groups[IDENTITY]
    return {group: tuple(values) for group, values in groups.items()}, columns
