"""A subject's identity as numbers, and what reads it from a model's features while the model trains.

Knowing every trait of every subject is the renderer's privilege. It helps the judges and the teacher to find features
that tell subjects apart (deep supervision, in the manner of REPA, arXiv 2410.06940); it never ships.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

from .. import world
from ..world import Identity

CHOICES = {
    "kind": world.TRAIN_KINDS,
    "pattern": world.PATTERNS,
    "eyes": (1, 2, 3),
    "mouth": world.MOUTHS,
    "accessory": world.ACCESSORIES,
}
"""Attributes of an identity that are one of several; the other attributes are numbers."""
NUMBERS = ("width", "height", "roundness", "limb", "pattern_scale", "eye_size", "eye_gap", "marks")
TRAITS = 9 + len(NUMBERS) + 2
"""Numbers that describe an identity: three colours, `NUMBERS`, and the pattern's angle as a direction."""


def of(identity: Identity) -> tuple[list[float], list[int]]:
    """An identity as numbers of about unit variance `[TRAITS]`, and the index of its value in each of `CHOICES`."""
    colours = np.array([*identity.body, *identity.second, *identity.accent])
    numbers = np.array([getattr(identity, name) for name in NUMBERS])
    angle = 2 * np.deg2rad(identity.pattern_angle)
    values = [*((colours - 0.6) * 3.5), *((numbers - 0.5) * 3.46), 1.4 * np.sin(angle), 1.4 * np.cos(angle)]
    return values, [options.index(getattr(identity, name)) for name, options in CHOICES.items()]


def table(pairs: Iterable[tuple[Identity, Identity]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The traits of pairs of subjects: numbers float32 `[N, 2, TRAITS]` and choices int64 `[N, 2, 5]`."""
    read = [[of(subject) for subject in pair] for pair in pairs]
    numbers = torch.tensor([[numbers for numbers, _ in pair] for pair in read], dtype=torch.float32)
    return numbers, torch.tensor([[choices for _, choices in pair] for pair in read])


class Reading(torch.nn.Module):
    """A linear layer that must read a subject's traits from features of `width` numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [TRAITS, *(len(options) for options in CHOICES.values())]
        self.linear = torch.nn.Linear(width, sum(self.sizes))

    def loss(self, features: torch.Tensor, numbers: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        """Of features `[N, width]` against numbers `[N, TRAITS]` and choices `[N, 5]`."""
        first, *rest = self.linear(features.float()).split(self.sizes, dim=1)
        named = [F.cross_entropy(logits, choices[:, column]) for column, logits in enumerate(rest)]
        return F.smooth_l1_loss(first, numbers) + sum(named, torch.zeros((), device=features.device)) / len(named)
