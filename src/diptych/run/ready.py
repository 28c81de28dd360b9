"""Checks what the stages need before the first row is made, so that an error in the last stage costs nothing.

    ready.distill(recipe)      # UsageError: distill.lora_targets: no linear layer is called 'to_x' …

There is one function a stage, which raises the errors that the stage would raise later. No weights are loaded: it reads
configs, headers of weights, names and packages, and builds models on torch's meta device. Models on the hub are
downloaded, because the stage needs them. On a cluster, a check runs on the workers of its stage. Complete stages are
skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data.engine import Engine
from diptych.data.places import desk
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.evaluate import suites
from diptych.evaluate.harness import refuse_curating_judge
from diptych.utils import models
from diptych.utils.opening import INDEX, check_pipeline

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe
    from diptych.run.runner import Stages
    from diptych.student.reference_pipeline import ReferencePipeline

ROWS = {"write": "prompts", "paint": "grids", "curate": "candidates"}  # a stage's output


def check(run: Stages, stages: Sequence[str], engine: Engine, earlier: Path | None = None) -> None:
    """Check what these stages of a run need. `earlier` is a run from which complete stages are taken over.

    Raises the UsageError or UserError that a stage would raise.
    """
    checks: dict[str, Callable[[Recipe], None]] = {
        "write": write,
        "paint": paint,
        "curate": curate,
        "distill": distill,
        "evaluate": evaluate,
    }
    for name in stages:
        if _complete(run, name, earlier):
            continue
        if name == "distill":  # trains in this process
            checks[name](run.recipe)
        else:
            engine.there(name, checks[name], run.recipe)


def _complete(run: Stages, stage: str, earlier: Path | None) -> bool:
    folder = run.folder
    if stage == "distill":
        return (desk(folder) / "student" / "training" / "summary.json").exists()
    if stage == "evaluate":
        return (folder / "report" / "metrics.json").exists()
    outputs = [Dataset(path / ROWS[stage]) for path in (folder, earlier) if path is not None]
    if not any(data.is_complete() for data in outputs):
        return False
    fingerprint = run.fingerprints.of(stage)
    return any(data.is_complete(fingerprint) for data in outputs)


def write(recipe: Recipe) -> None:
    """Check the writer: its task, its vocabulary or seed captions, and the language model."""
    from diptych.llm import client
    from diptych.stages.write import llm_writer
    from diptych.stages.write.stage import WriteStage, grammar

    stage = WriteStage(recipe)
    if recipe.write.writer == "grammar":
        grammar(stage)
        return
    llm_writer.LanguageModel(recipe, stage.task, None)  # pyright: ignore[reportArgumentType] (no question is sent)
    client.check(recipe.write.endpoint, recipe.write.local, recipe.write.vllm, sees=False)


def paint(recipe: Recipe) -> None:
    """Check the teacher with its memory preset and speed preset."""
    import torch

    from diptych.stages.paint import memory_for, warnings
    from diptych.student.runtime import stock
    from diptych.utils.machine import pick_device, pick_precision

    folder, device = teacher(recipe), pick_device(recipe.device)
    dtype = getattr(torch, pick_precision(recipe.paint.dtype, device)[0])
    warnings(recipe, folder)
    with _without_warnings():  # the stage prints them
        memory_for(recipe, folder, device, dtype)
        stock.resolve_speed(folder, recipe.paint.speed)


def curate(recipe: Recipe) -> None:
    """Check the judge, the classifiers of the screens, and the vision-language model."""
    from diptych.judges.embedding import EmbeddingJudge
    from diptych.llm import client
    from diptych.stages.curate import screens

    settings = recipe.curate
    EmbeddingJudge.check(settings.judge, "curator")
    for classifier in settings.screens.classifiers if settings.screens else ():
        screens.check(classifier)
    if settings.vlm is not None:
        client.check(settings.vlm.endpoint, settings.vlm.local, settings.vlm.vllm)


def distill(recipe: Recipe) -> None:
    """Check imported data, the teacher, the trained layers and their source, and the packages that training uses."""
    import torch

    from diptych.student.runtime import quantize
    from diptych.student.weights.sources import open_source
    from diptych.train import metrics, parts, schedule
    from diptych.train.prepare import Material, check_init
    from diptych.utils.machine import pick_device

    settings = recipe.distill
    metrics.check(settings.trackers)
    Material.open(recipe, None)
    folder = teacher(recipe)
    check_init(recipe, folder)
    if settings.init and settings.mode == "full":
        open_source(models.resolve(settings.init, "student"), folder)
    if problem := quantize.problem(settings.quantize, pick_device(recipe.device).type):
        raise UsageError("device_unavailable", f"distill.quantize: {problem}")
    options = settings.model_copy(update={"offload": "none"})
    parts.optimizer(parts.Trained(["weight"], [torch.nn.Parameter(torch.zeros(1))], {}), options)
    pipe = student(recipe, folder)
    schedule.choose(pipe, settings.buckets, recipe.paint.panel_size, settings.shift)
    parts.select(pipe.transformer, options, "float32", torch.device("meta"))


def teacher(recipe: Recipe) -> Path:
    """Return the teacher's folder. Raises UserError if it is not a pipeline, or has code or pickles."""
    folder = models.resolve(recipe.teacher, "teacher")
    check_pipeline(folder)
    return folder


def student(recipe: Recipe, folder: Path) -> ReferencePipeline:
    """Return a student of the teacher in `folder` without weights. Raises UserError if no student can be made of it."""
    import inspect

    import diffusers
    import torch

    from diptych.student.families import family_in
    from diptych.student.families.flux1 import FLUX1
    from diptych.student.pipeline import DiptychPipeline, pipeline_class
    from diptych.student.settings import KEY
    from diptych.student.weights.files import read_json
    from diptych.train.prepare import check_family, student_settings

    family, index = family_in(folder), read_json(folder / INDEX)
    check_family(recipe, family)
    config: Any = read_json(folder / "transformer" / "config.json")
    channels, out = family.channels(config)
    if channels != out:
        message = f"{folder / 'transformer'} is widened already. Use the text-to-image model as the teacher."
        raise UserError("model_unsupported", message)
    settings = student_settings(recipe, None)
    wide = (None if settings.conditioning == "tokens" else family.widened(config)) or {}
    with torch.device("meta"):
        transformer = getattr(diffusers, family.transformer).from_config({**config, **wide, KEY: settings.values()})
        vae: Any = getattr(diffusers, index["vae"][1])
        vae = vae.from_config(read_json(folder / "vae" / "config.json"))
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = scheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    cls = DiptychPipeline if family is FLUX1 else pipeline_class(index["_class_name"])
    named = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    parts = [name for name in inspect.signature(cls.__init__).parameters if isinstance(index.get(name), list)]
    return cls(**{**dict.fromkeys(parts), **named})


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress diptych's warnings inside the block."""
    log = logging.getLogger("diptych")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def evaluate(recipe: Recipe) -> None:
    """Check the judges, which must differ from the one that curated, and the models of the methods."""
    from diptych.judges.attributes import AttributeReader
    from diptych.judges.embedding import EmbeddingJudge
    from diptych.student.families import is_flux1

    settings = recipe.evaluate
    if settings.suite == "none" and not settings.relight:
        return
    refuse_curating_judge(recipe)
    EmbeddingJudge.check(settings.scorer, "scorer")
    EmbeddingJudge.check(recipe.curate.judge, "curator")
    AttributeReader.check(settings.reader)
    if settings.suite == "none":
        return
    suites.load(settings.suite)
    baselines = [name for name in ("text_only", "inpaint", "tuned", "adapter") if name in settings.methods]
    if baselines and not is_flux1(teacher(recipe)):
        raise UsageError(
            "method_unsuited",
            f"evaluate.methods: {', '.join(baselines)} needs a FLUX.1 teacher, and {recipe.teacher} is not one. Leave "
            "it out; student, copy and pipeline work with every teacher.",
        )
    if "pipeline" in settings.methods:
        from diptych.evaluate.methods.baselines import model_of

        check_pipeline(models.resolve(model_of(recipe), "teacher"), "pipeline")
    if "adapter" in settings.methods:
        from diptych.evaluate.methods import adapter

        adapter.refuse_scorer(recipe)
        if settings.adapter.path is not None:
            adapter.adapter_file(Path(settings.adapter.path))
    if "tuned" in settings.methods:
        from diptych.train import parts

        shape = student(recipe, teacher(recipe)).transformer
        parts.lora_targets(shape, settings.tuning.lora_targets, "evaluate.tuning.lora_targets")
