"""Preparation of a training: opening models, encoding pairs and captions, holding out pairs.

    trainer = loop.train(prepare(recipe, Material.open(recipe, pairs), folder))

`Material` has the data sets, and `TrainingJob` everything that the loop needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diptych.data.sources import Pairs, open_pairs
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.recipe import tasks
from diptych.recipe.schema import OWN, Data
from diptych.student.canvas import Canvas
from diptych.student.families import family_in, teachers
from diptych.student.families.base import Family
from diptych.student.families.flux1 import FLUX1
from diptych.train import cache, checkpoint, preference, schedule
from diptych.train.metrics import Progress, report
from diptych.train.processes import ALONE, Processes
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.io import sha256_json

if TYPE_CHECKING:
    from diptych.recipe.schema import Distill, Recipe
    from diptych.student.reference_pipeline import ReferencePipeline
    from diptych.student.settings import Settings

TRAINING = models.TRAINING
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """The data sets to train on. `own` are the run's pairs, if there are any."""

    own: Dataset | None
    sets: Sequence[Pairs]
    weights: Sequence[float]

    @classmethod
    def open(cls, recipe: Recipe, own: Dataset | None) -> Material:
        """The data sets that `distill.data` names. UserError if one cannot be read or is empty."""
        named = [data for data in recipe.distill.data or [Data(path=OWN)] if data.path != OWN or own is not None]
        sets: list[Pairs] = []
        for data in named:
            pairs = own if data.path == OWN else open_pairs(data.path, {**data.columns}, data.split)
            assert pairs is not None
            if not len(pairs):
                remedy = "Lower curate.thresholds or raise write.count" if pairs is own else "Use other data"
                raise UserError("run_empty", f"No pairs to train on in {pairs.url}. {remedy}.")
            sets.append(pairs)
        return cls(own, sets, [data.weight for data in named])

    def fingerprint(self) -> str:
        """The fingerprint of the run's pairs alone, or of all data sets and their weights."""
        fingerprints = [each.fingerprint() for each in self.sets]
        if list(self.sets) == [self.own] and self.weights == [1.0]:
            return fingerprints[0]
        weighted = [[*both] for both in zip(fingerprints, self.weights, strict=True)]
        return sha256_json(weighted, sort_keys=False)


@dataclass
class TrainingJob:
    """Everything that the loop needs. `pipe.transformer` is trained in place."""

    pipe: Any  # ReferencePipeline
    buckets: Sequence[schedule.Bucket]  # one, unless the recipe has more
    options: Distill  # resolved: no key is `auto`, and `seed` is set
    device: torch.device
    latents: cache.Latents
    text: cache.Text
    train_rows: list[int]
    validation_rows: list[int]
    folder: Path  # checkpoints, metrics.jsonl, samples/
    material: Material  # the data sets of the latents
    made_from: dict[str, str] = field(default_factory=dict)  # fingerprints of the base and the pairs
    processes: Processes = ALONE
    name: str = "student"  # of the run in trackers
    negatives: preference.Negatives | None = None  # with `options.preference`
    columns: torch.Tensor | None = None  # (D, C), the initial columns of the input layer for the condition
    family: Family = FLUX1

    def __post_init__(self) -> None:
        if len(self.train_rows) < self.options.batch_size:
            held_out = f" ({len(self.validation_rows)} more are held out)" if self.validation_rows else ""
            raise UserError(
                "run_empty",
                f"{len(self.train_rows)} pairs to train on{held_out} are fewer than one batch of "
                f"{self.options.batch_size}. Lower curate.thresholds, paint more grids (write.count), or lower "
                "distill.batch_size.",
            )

    @property
    def canvas(self) -> Canvas:
        """The canvas of the first bucket."""
        return self.buckets[0].canvas

    def identity(self) -> dict[str, Any]:
        """The values that must equal a checkpoint's to resume from it."""
        return {**checkpoint.identity(self.options, self.options.seed or 0), **self.made_from}


def prepare(
    recipe: Recipe,
    material: Material,
    out: Path,
    progress: Progress | None = None,
    processes: Processes | None = None,
    device: torch.device | None = None,
) -> TrainingJob:
    """Prepares a training: opens models, encodes pairs and captions, and holds out pairs."""
    from diptych.utils.machine import pick_device, pick_precision

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device, processes, recipe = device or pick_device(recipe.device), processes or ALONE, tasks.resolve(recipe)
    settings = recipe.distill
    precision, reason = pick_precision(settings.precision, device)
    log.info("training on %s in %s: %s", device, precision, reason)

    folder = out / TRAINING
    made_from = sources(recipe, material)
    pipe = start(recipe, device)
    places = schedule.choose(pipe, settings.buckets, recipe.paint.panel_size, settings.shift)
    resolved = {"seed": recipe.training_seed, "precision": precision, "shift": places[0].shift}
    options = settings.model_copy(update=resolved)
    latest = checkpoint.pointer(folder, checkpoint.LATEST)
    step = int(latest.removeprefix("step-")) if latest else 0

    def preparing(done: int, total: int, what: str) -> None:
        report(progress, step, settings.steps, f"{what} {done}/{total}")

    canvases = [place.canvas for place in places]
    pipe.settings = replace(
        pipe.settings, sizes=tuple((canvas.panel_height, canvas.panel_width) for canvas in canvases)
    )
    encode = cache.canvas_encoder(pipe.encode_canvas, canvases[0].panels)
    vae = cache.vae_fingerprint(pipe)
    aligned = tasks.load(recipe.task).geometry == "aligned"
    files = []
    for each in material.sets:
        key = f"{vae} {each.fingerprint()}"
        files.append(
            cache.build(each, folder / "latents", encode, canvases, key, preparing, processes, aligned=aligned)
        )
    encoded = cache.Latents(*files)
    captions = [sample.caption for sample in encoded.samples]
    if options.instructions:
        captions += [sample.instruction for sample in encoded.samples if sample.instruction]
    embeddings = cache.embed_captions(torch.no_grad()(pipe.encode_text), captions, preparing)
    if isinstance(embeddings, cache.CaptionTable) and device.type != "cpu":
        _set_aside(pipe)
    train_rows, validation_rows = schedule.split(encoded.samples, options.validation_pairs)
    negatives = None
    if options.preference is not None:
        train_rows = preference.choose(train_rows, encoded, options.preference.pairs)
        sampler = preference.NegativeSampler(pipe, places, encoded, embeddings, options)
        with _as_it_starts(pipe, recipe):
            key = f"{made_from['base']} {made_from['pairs']}"
            negatives = sampler.generate(train_rows, folder, key, preparing, processes)
    made_from["panel_size"] = schedule.named(places)
    return TrainingJob(
        pipe=pipe,
        buckets=places,
        options=options,
        device=device,
        latents=encoded,
        text=embeddings,
        train_rows=train_rows,
        validation_rows=validation_rows,
        folder=folder,
        material=material,
        made_from=made_from,
        processes=processes,
        name=recipe.name,
        negatives=negatives,
        columns=_columns(pipe, options, canvases[0]),
        family=pipe.family,
    )


def _columns(pipe: ReferencePipeline, options: Distill, canvas: Canvas) -> torch.Tensor | None:
    """The initial columns of the input layer for the condition (`distill.condition_init`). None leaves them at zero."""
    from PIL import Image

    from diptych.student.weights.fold import image_columns

    if options.condition_init == "zeros" or options.init:
        return None
    empty = None
    if options.conditioning == "diptych":
        black = Image.new("RGB", (canvas.panel_width, canvas.panel_height))
        empty = pipe.encode_reference([black], canvas).mean((0, 1)).cpu()
    weight = pipe.transformer.get_submodule(pipe.family.input_layer).weight
    return image_columns(weight.detach().float().cpu().flatten(1), empty)


def _set_aside(pipe: ReferencePipeline) -> None:
    """Moves the text encoders to main memory, because all captions are encoded."""
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to("cpu")


@contextmanager
def _as_it_starts(pipe: Any, recipe: Recipe) -> Iterator[None]:
    """A context in which the pipeline has the LoRA that training starts from, if there is one."""
    from diptych.student.weights.lora import apply_lora

    if recipe.distill.mode == "full":
        yield
        return
    apply_lora(pipe, models.resolve(recipe.distill.init or "", "student"))
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def sources(recipe: Recipe, material: Material) -> dict[str, str]:
    """Fingerprints of a student's origin: the weights that its training starts from, and its pairs."""
    init = recipe.distill.init
    places = [models.resolve(init, "student")] if init else []
    if recipe.distill.mode == "lora" or not init:
        places.insert(0, models.resolve(recipe.teacher, "teacher"))
    return {"base": " ".join(map(models.fingerprint, places)), "pairs": material.fingerprint()}


def start(recipe: Recipe, device: Any) -> ReferencePipeline:
    """The student before its first step: the teacher, widened unless its reference comes as tokens, or, in mode full,
    the student that `distill.init` names; its frozen weights quantized as the recipe says. `parts.select` adds a LoRA
    that training continues from."""
    from diptych import student
    from diptych.student.loading import pick_dtype
    from diptych.student.pipeline import as_student
    from diptych.student.settings import register, resolve
    from diptych.student.weights.fold import build, widen

    teacher, settings = models.resolve(recipe.teacher, "teacher"), recipe.distill
    dtype, family = pick_dtype(teacher / "transformer", device), family_in(teacher)
    check_family(recipe, family)
    check_init(recipe, teacher)
    if settings.init and settings.mode == "full":
        with quiet_bars():
            pipe = student.load(settings.init, base=recipe.teacher, device=device, fuse=True)
        pipe.settings = student_settings(recipe, pipe.settings.words)
        return pipe
    stock = teachers.open_teacher(teacher, dtype, "FluxPipeline" if family is FLUX1 else None)
    tokens, plain = settings.conditioning == "tokens", stock.transformer
    transformer = build(plain.config, plain.state_dict(), type(plain)) if tokens else widen(plain)
    register(transformer, student_settings(recipe, resolve(None, [teacher]).words))
    pipe = as_student(stock, transformer)
    pipe.loaded_from = (teacher,)
    pipe.set_progress_bar_config(disable=True)
    if settings.offload == "blocks":  # `parts.select` moves the transformer
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name != "transformer":
                part.to(device)
        return pipe
    return _quantized(pipe, settings.quantize, device, dtype).to(device)


def check_family(recipe: Recipe, family: Family) -> None:
    """UsageError for a training that the teacher's family does not support."""
    settings = recipe.distill
    family.check(settings.conditioning, settings.positions, settings.reference_attention)
    if family is FLUX1 or settings.mode == "full":
        return
    if settings.conditioning != "tokens":
        raise UsageError(
            "method_unsuited",
            f"distill.mode: lora cannot be used with conditioning: {settings.conditioning} and {family.transformer}, "
            "because diffusers loads LoRAs with a wider input layer for FLUX.1 only. Set mode: full, or conditioning: "
            "tokens.",
        )
    if settings.init:
        raise UsageError(
            "method_unsuited",
            f"distill.init is for mode: full with {family.transformer}; LoRAs are trained further for FLUX.1 only.",
        )


def check_init(recipe: Recipe, teacher: Path) -> None:
    """UsageError if training cannot start from the student that `distill.init` names. Nothing if it names none."""
    from diptych.student.settings import OF_TOKENS
    from diptych.student.weights.sources import locate, read_settings

    settings = recipe.distill
    if not settings.init:
        return
    place = models.resolve(settings.init, "student")
    registered = read_settings(place, teacher)
    for key in ("conditioning", *OF_TOKENS):
        if (other := getattr(registered, key)) != getattr(settings, key):
            raise UsageError(
                "model_mismatch", f"distill.init: {settings.init} has {key} {other}. Set distill.{key}={other}."
            )
    if settings.mode == "lora" and locate(place, teacher)[0] != "control-lora":
        raise UsageError(
            "recipe_conflict",
            f"distill.init: {settings.init} is a complete student, and mode: lora trains adapters of the teacher. Use "
            "a control-LoRA, or mode: full.",
        )


def _quantized(pipe: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    if name != "none":
        from diptych.student.runtime.quantize import problem, quantize

        if reason := problem(name, device.type):
            raise UsageError("device_unavailable", f"distill.quantize: {reason}.")
        quantize(pipe.transformer, name, device, dtype)
    return pipe


def student_settings(recipe: Recipe, words: tuple[str, ...] | None) -> Settings:
    """The settings that the student registers. Sampling defaults are those with which the recipe evaluates it."""
    from diptych.student.settings import OF_TOKENS, Settings

    sampling = recipe.evaluate.model_dump(include={"steps", "image_guidance", "text_guidance", "null_panel"})
    sampling = {name: value for name, value in sampling.items() if value is not None}
    relight = recipe.evaluate.relighting.model_dump(exclude_none=True)
    entry = recipe.distill.model_dump(include={"conditioning", *OF_TOKENS})
    if entry["conditioning"] == "tokens":  # there is no left panel for the null pass
        for values in (sampling, relight):
            values.pop("null_panel", None)
    return Settings(**entry, relight=relight, words=words, **sampling)
