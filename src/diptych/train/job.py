"""What a training needs before its first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diptych.data.sources import Pairs, open_pairs
from diptych.data.store import Dataset
from diptych.errors import UserError
from diptych.recipe.schema import OWN, Data
from diptych.student.canvas import Canvas
from diptych.train.buckets import Bucket
from diptych.train.cached import Text
from diptych.train.checkpoint import identity
from diptych.train.latents import Latents
from diptych.train.preference import Negatives
from diptych.train.processes import ALONE, Processes

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill, Recipe


@dataclass
class Job:
    """All that a run of the loop needs. `pipe.transformer` is trained in place."""

    pipe: Any  # DiptychPipeline
    buckets: Sequence[Bucket]  # one, unless the recipe has more
    options: Distill  # resolved: no key is `auto`, and `seed` is set
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
        return {**identity(self.options, self.options.seed or 0), **self.made_from}


# What a training is made from: its data sets, opened once, with their weights and their fingerprint.


@dataclass(frozen=True)
class Material:
    """The data sets to train on. `own` are the run's own pairs, if there are any."""

    own: Dataset | None
    sets: Sequence[Pairs]
    weights: Sequence[float]

    @classmethod
    def open(cls, recipe: Recipe, own: Dataset | None) -> Material:
        """Those that `distill.data` names. UserError when one cannot be read or is empty."""
        named = [data for data in recipe.distill.data or [Data(path=OWN)] if data.path != OWN or own is not None]
        sets: list[Pairs] = []
        for data in named:
            found = own if data.path == OWN else open_pairs(data.path, {**data.columns}, data.split)
            assert found is not None
            if not len(found):
                cure = "lower curate.thresholds or draw more grids (write.count)" if found is own else "give other data"
                raise UserError(f"{found.url} holds no pairs, so there is nothing to train on; {cure}")
            sets.append(found)
        return cls(own, sets, [data.weight for data in named])

    def fingerprint(self) -> str:
        """Of the run's own pairs if there is nothing else; else of all data sets and their weights."""
        prints = [each.fingerprint() for each in self.sets]
        if list(self.sets) == [self.own] and self.weights == [1.0]:
            return prints[0]
        weighed = [[*both] for both in zip(prints, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(weighed).encode()).hexdigest()
