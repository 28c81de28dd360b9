"""What a training needs before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diptych.errors import UserError
from diptych.student.canvas import Canvas
from diptych.train.buckets import Bucket
from diptych.train.latents import Latents
from diptych.train.material import Material
from diptych.train.options import Options, identity
from diptych.train.preference import Negatives
from diptych.train.processes import ALONE, Processes
from diptych.train.text import Text


@dataclass
class Job:
    """All that a run of the loop needs. `pipe.transformer` is trained in place."""

    pipe: Any  # DiptychPipeline
    buckets: Sequence[Bucket]  # one, unless the recipe has more
    options: Options  # with `precision` and `shift` decided
    device: torch.device
    latents: Latents
    text: Text
    train_rows: list[int]
    validation_rows: list[int]
    folder: Path  # checkpoints, metrics.jsonl, samples/
    material: Material  # what the latents come from
    made_from: dict[str, str] = field(default_factory=dict)  # fingerprints of the base and the pairs
    processes: Processes = ALONE
    name: str = "student"  # what trackers call it
    negatives: Negatives | None = None  # with `options.preference`
    columns: torch.Tensor | None = None  # (D, C) where the input layer's for the condition begin; None: as they are

    def __post_init__(self) -> None:
        if len(self.train_rows) < self.options.batch_size:
            raise UserError(
                f"{len(self.train_rows)} pairs to train on are fewer than one batch of {self.options.batch_size}"
                f"{f' ({len(self.validation_rows)} more are held out)' if self.validation_rows else ''}: "
                "lower curate.thresholds, draw more grids (write.count), or lower distill.batch_size"
            )

    @property
    def canvas(self) -> Canvas:
        """The first bucket's."""
        return self.buckets[0].canvas

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this job."""
        return {**identity(self.options), **self.made_from}
