"""What each stage needs, checked before any stage runs: one function a stage, which raises what the stage itself would.

    ready.distill(recipe)      # UsageError: distill.lora_targets: no linear layer is called 'to_x' …

No weight is loaded: configs, headers of weights, names and packages are read, and models are built without memory
(torch's meta device). What a name on the hub stands for is downloaded, since the stage needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diptych import models
from diptych.errors import UsageError, UserError
from diptych.teachers.configs import INDEX
from diptych.teachers.opening import check_pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from diptych.sections import Recipe
    from diptych.student.pipeline import DiptychPipeline


def write(recipe: Recipe) -> None:
    """The writer: its task, words or seed captions, and who is asked."""
    from diptych.llm import ready
    from diptych.stages import llm_writer
    from diptych.stages.write import Write, grammar

    stage = Write(recipe)
    if recipe.write.writer == "grammar":
        grammar(stage)
        return
    llm_writer.LanguageModel(recipe, stage.task, None)  # pyright: ignore[reportArgumentType] (nothing is asked)
    ready.check(recipe.write.endpoint, recipe.write.local, recipe.write.vllm, sees=False)


def paint(recipe: Recipe) -> None:
    """The teacher, and how it is held and hurried."""
    import torch

    from diptych.stages.paint import doubts, memory_for
    from diptych.student import stock
    from diptych.student.loading import pick_device
    from diptych.train.hardware import pick_precision

    folder, device = teacher(recipe), pick_device(recipe.device)
    dtype = getattr(torch, pick_precision(recipe.paint.dtype, device)[0])
    doubts(recipe, folder)
    with _unsaid():  # the stage says it
        memory_for(recipe, folder, device, dtype)
        stock.speed_of(folder, recipe.paint.speed)


def curate(recipe: Recipe) -> None:
    """The judge, the classifiers of the screens, and the vision-language model."""
    from diptych.judges.embedding import EmbeddingJudge
    from diptych.llm import ready
    from diptych.stages.screens import PanelClassifier

    settings = recipe.curate
    EmbeddingJudge.check(settings.judge, "curator")
    for classifier in settings.screens.classifiers if settings.screens else ():
        PanelClassifier.check(classifier)
    if settings.vlm is not None:
        ready.check(settings.vlm.endpoint, settings.vlm.local, settings.vlm.vllm)


def distill(recipe: Recipe) -> None:
    """The data of others, the teacher, what is trained of it and from where, and the packages that training uses."""
    import torch

    from diptych.stages.distill import check_init
    from diptych.student import quantize
    from diptych.student.loading import pick_device
    from diptych.student.sources import open_source
    from diptych.train import buckets, parts, trackers
    from diptych.train.material import Material
    from diptych.train.options import Options

    settings = recipe.distill
    trackers.check(settings.trackers)
    Material.open(recipe, None)
    folder = teacher(recipe)
    check_init(recipe, folder)
    if settings.init and settings.mode == "full":
        open_source(models.resolve(settings.init, "student"), folder)
    if problem := quantize.problem(settings.quantize, pick_device(recipe.device).type):
        raise UsageError(f"distill.quantize: {problem}")
    options = replace(Options.of(settings, seed=recipe.training_seed), offload="none")
    parts.optimizer(parts.Trained(["weight"], [torch.nn.Parameter(torch.zeros(1))], {}), options)
    pipe = student(recipe, folder)
    buckets.choose(pipe, settings.buckets, recipe.paint.panel_size, settings.shift)
    parts.select(pipe.transformer, options, "float32", torch.device("meta"))


def teacher(recipe: Recipe) -> Path:
    """The teacher's folder. UserError if it is no pipeline's, or brings code or pickles."""
    folder = models.resolve(recipe.teacher, "teacher")
    check_pipeline(folder)
    return folder


def student(recipe: Recipe, folder: Path) -> DiptychPipeline:
    """A student of the teacher in `folder` without weights: the shapes of its parts. UserError if it is no FLUX."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from diptych.student.files import read_json
    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.settings import Settings

    index: Any = read_json(folder / INDEX)
    named = index.get("transformer") or [None, "no transformer"]
    if named[1] != "FluxTransformer2DModel":
        raise UserError(
            f"the teacher in {folder} cannot be opened as a FLUX pipeline (it is a {index.get('_class_name')}, with "
            f"{named[1]}): students are distilled from FLUX.1 teachers"
        )
    config: Any = read_json(folder / "transformer" / "config.json")
    out = config.get("out_channels") or config["in_channels"]
    if config["in_channels"] != out:
        raise UserError(f"{folder / 'transformer'} is widened already; the teacher must be the text-to-image model")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config({**config, "in_channels": 2 * out, "out_channels": out})
        vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    none: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = DiptychPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **none)  # pyright: ignore
    pipe.settings = Settings(conditioning=recipe.distill.conditioning)
    return pipe


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keeps our own warnings back."""
    log = logging.getLogger("diptych")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
