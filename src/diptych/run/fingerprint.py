"""What makes the rows of each stage: its settings, its models, and, through its input's own fingerprint, all before.

    Fingerprints(recipe, task, Path("runs/first")).of("curate")

Parts that were made by another fingerprint are made again, or refused; equal ones are taken over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from diptych.data import labels
from diptych.recipe import tasks
from diptych.recipe.schema import Recipe
from diptych.utils import models
from diptych.utils.io import sha256, sha256_json

# Raised when the rows a stage makes from equal inputs change: parts of an older version are then not mixed in.
VERSIONS = {"write": 1, "paint": 1, "curate": 1, "select": 1}
ALIGNED = 2  # the same, for what curation does with aligned panels alone
WORDED = 2  # the same, for what is written by a language model or from a vocabulary, whose captions name the style
TRAINING_KEYS = {"captions": {"instructions"}}  # of a task: no row depends on them


class Fingerprints:
    """Those of one run's stages."""

    def __init__(
        self, recipe: Recipe, task: tasks.Task, folder: Path, weights: Mapping[str, str] | None = None
    ) -> None:
        """`weights` are the models' hashes by role (`teacher`, `curator`, `screen NAME`), as manifests name them; None
        takes them from the models, which must then be here."""
        self.recipe, self.task, self.folder, self._weights = recipe, task, folder, weights

    def teacher(self) -> str:
        return self._hash("teacher", "teacher", self.recipe.teacher)

    def judge(self) -> str:
        return self._hash("curator", "curator", self.recipe.curate.judge)

    def screens(self) -> dict[str, str]:
        """Of the classifiers that screen panels, by the screen's name."""
        screens = self.recipe.curate.screens
        return (
            {c.name: self._hash(f"screen {c.name}", "screen", c.model) for c in screens.classifiers} if screens else {}
        )

    def _hash(self, role: str, kind: str, model: str) -> str:
        return models.fingerprint(models.resolve(model, kind)) if self._weights is None else self._weights[role]

    def of(self, stage: str) -> str:
        """The fingerprint of `write`, `paint`, `curate` or `select`."""
        recipe = self.recipe
        settings: list[str]
        if stage == "write":
            from diptych.stages.write.stage import words_digest

            task = sha256(self.task.model_dump_json(exclude=TRAINING_KEYS))
            words = words_digest(recipe)
            settings = [recipe.fingerprint("seed", "write"), task, words]
            settings += [f"worded {WORDED}"] if words or recipe.write.writer == "llm" else []
        elif stage == "paint":
            settings = [self.of("write"), recipe.fingerprint("paint", "device", "threads"), self.teacher()]
        elif stage == "curate":
            settings = [self.of("paint"), recipe.fingerprint("curate"), self.judge(), *self.screens().values()]
            settings += [f"aligned {ALIGNED}"] if self.task.geometry == "aligned" else []
        else:
            settings = [self.of("curate"), recipe.fingerprint("curate.thresholds")]
            if decided := labels.applied(self.folder):
                settings.append(json.dumps(sorted(labels.both_ways(decided).items())))
        return sha256_json([stage, VERSIONS[stage], *settings], sort_keys=False)
