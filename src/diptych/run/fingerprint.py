"""Fingerprints of the rows of each stage: hashes of its settings, its models, and the fingerprint of its input.

    Fingerprints(recipe, task, Path("runs/first")).of("curate")

Parts with another fingerprint are made again or are an error; parts with the same fingerprint are reused.
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

# Raise a number when the rows that a stage makes from equal inputs change, so that parts of an older version are not
# mixed with new ones.
VERSIONS = {"write": 1, "paint": 1, "curate": 1, "select": 1}
ALIGNED = 2  # the same, for curation of tasks with aligned panels only
WORDED = 2  # the same, for prompts of a language model or a vocabulary, whose captions name the style
TRAINING_KEYS = {"captions": {"instructions"}}  # keys of a task on which no row depends


class Fingerprints:
    """The fingerprints of one run's stages."""

    def __init__(
        self, recipe: Recipe, task: tasks.Task, folder: Path, weights: Mapping[str, str] | None = None
    ) -> None:
        """`weights` are the models' hashes by role, as in manifests (`teacher`, `curator`, `screen NAME`).

        None computes them from the models, which must then be on this machine.
        """
        self.recipe, self.task, self.folder, self._weights = recipe, task, folder, weights

    def teacher(self) -> str:
        """Return the hash of the teacher."""
        return self._hash("teacher", "teacher", self.recipe.teacher)

    def judge(self) -> str:
        """Return the hash of the judge that curates."""
        return self._hash("curator", "curator", self.recipe.curate.judge)

    def screens(self) -> dict[str, str]:
        """Return the hashes of the classifiers that screen panels, by the screen's name."""
        from diptych.stages.curate import screens

        settings = self.recipe.curate.screens
        classifiers = settings.classifiers if settings else ()
        if self._weights is not None:
            return {each.name: self._weights[f"screen {each.name}"] for each in classifiers}
        return {each.name: screens.fingerprint(each.model) for each in classifiers}

    def _hash(self, role: str, kind: str, model: str) -> str:
        return models.fingerprint(models.resolve(model, kind)) if self._weights is None else self._weights[role]

    def of(self, stage: str) -> str:
        """Return the fingerprint of `write`, `paint`, `curate` or `select`."""
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
