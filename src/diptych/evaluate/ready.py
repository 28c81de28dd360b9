"""What evaluation needs, checked before any stage runs, as `stages.ready` does for the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diptych import models
from diptych.evaluate import suites
from diptych.evaluate.run_suite import refuse_one_judge
from diptych.stages import ready
from diptych.teachers.opening import check_pipeline

if TYPE_CHECKING:
    from diptych.sections import Recipe


def evaluate(recipe: Recipe) -> None:
    """The judges, which are not the one that curated, and the models of the methods. UsageError or UserError."""
    from diptych.judges.attributes import AttributeReader
    from diptych.judges.embedding import EmbeddingJudge

    settings = recipe.evaluate
    if settings.suite == "none" and not settings.relight:
        return
    refuse_one_judge(recipe)
    EmbeddingJudge.check(settings.scorer, "scorer")
    EmbeddingJudge.check(recipe.curate.judge, "curator")
    AttributeReader.check(settings.reader)
    if settings.suite == "none":
        return
    suites.load(settings.suite)
    if "pipeline" in settings.methods:
        from diptych.evaluate.pipelines import model_of

        check_pipeline(models.resolve(model_of(recipe), "teacher"), "pipeline")
    if "adapter" in settings.methods:
        from diptych.evaluate import adapter

        adapter.refuse_scorer(recipe)
        if settings.adapter.path is not None:
            adapter.adapter_file(Path(settings.adapter.path))
    if "tuned" in settings.methods:
        from diptych.train import parts

        shape = ready.student(recipe, ready.teacher(recipe)).transformer
        parts.lora_targets(shape, settings.tuning.lora_targets, "evaluate.tuning.lora_targets")
