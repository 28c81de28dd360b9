"""Stage 4, distill: the teacher becomes a student, trained on its own curated pairs (paper section 3.2).

    distill(recipe, Dataset("runs/demo/pairs"), Path("runs/demo/student"))

The folder ends as an ordinary diffusers pipeline (mode full) or a control-LoRA file (mode lora), with a model card and
`training/`: metrics.jsonl, checkpoints, sample sheets, the latent cache. Called again it continues; when it is finished
it returns its summary at once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data.seal import text_hash
from diptych.data.store import Dataset
from diptych.errors import UsageError, UserError
from diptych.recipe import tasks
from diptych.student.families import teachers
from diptych.train.card import model_card
from diptych.train.checkpoint import harmless
from diptych.train.job import Material
from diptych.train.metrics import Progress, report
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.io import write_atomic

if TYPE_CHECKING:
    import torch

    from diptych.recipe.schema import Distill, Recipe
    from diptych.student.canvas import Canvas
    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.settings import Settings
    from diptych.train.job import Job
    from diptych.train.loop import Trainer
    from diptych.train.parts import Trained
    from diptych.train.processes import Processes

TRAINING = models.TRAINING
SUMMARY = "summary.json"
ORIGIN = "origin.json"
INDEX = "model_index.json"
log = logging.getLogger(__name__)


def distill(
    recipe: Recipe,
    pairs: Dataset | None,
    out: Path,
    progress: Progress | None = None,
    recipe_sha256: str | None = None,
) -> dict[str, Any]:
    """Trains a student on `pairs`, and on what `distill.data` names, into the folder `out`.

    Returns a summary of plain values (`loop.summary`).

    Args:
        recipe: `distill`, `teacher`, `seed`, `device`, `threads` and `paint.panel_size` are read.
        pairs: the run's own, rows of `records.PAIR`; those that curation did not keep are passed over. None where
            `distill.data` has other people's alone.
        out: made if need be; a checkpoint in it is continued exactly.
        progress: called, or its `update` called, with (step, total, text).
        recipe_sha256: of the run's recipe.yaml, which the student then names as where it comes from.

    Raises UserError (too few pairs, a step that went wrong, a full disk), UsageError (a checkpoint of another
    training, a step-distilled teacher). Ctrl-C saves a checkpoint and raises KeyboardInterrupt.
    """
    from diptych.train.loop import train
    from diptych.train.processes import join
    from diptych.utils.machine import pick_device

    teachers.refuse(recipe.teacher, recipe.distill.allow_distilled_teacher)
    out, recipe = Path(out), tasks.resolve(recipe)
    steps = recipe.distill.steps
    material = Material.open(recipe, pairs)
    if (done := finished(out, recipe, material)) is not None:
        report(progress, steps, steps, "already trained")
        return done
    processes, device = join(pick_device(recipe.device))
    processes.share(range(recipe.distill.batch_size))  # refused here if it does not divide, before anything is encoded
    progress = progress if processes.first else None
    trainer = train(prepare(recipe, material, out, progress, processes, device), progress)
    return finish(trainer, recipe, out, recipe_sha256)


def prepare(
    recipe: Recipe,
    material: Material,
    out: Path,
    progress: Progress | None = None,
    processes: Processes | None = None,
    device: torch.device | None = None,
) -> Job:
    """Everything up to the first step: models opened, pairs and captions encoded, some held out."""
    import torch

    from diptych.train import buckets, cached, checkpoint, latents, preference
    from diptych.train.job import Job
    from diptych.train.processes import ALONE
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
    places = buckets.choose(pipe, settings.buckets, recipe.paint.panel_size, settings.shift)
    decided = {"seed": recipe.training_seed, "precision": precision, "shift": places[0].shift}
    options = settings.model_copy(update=decided)
    at = checkpoint.pointer(folder, checkpoint.LATEST)
    step = int(at.removeprefix("step-")) if at else 0

    def preparing(done: int, total: int, what: str) -> None:
        report(progress, step, settings.steps, f"{what} {done}/{total}")

    canvases = [place.canvas for place in places]
    pipe.settings = replace(
        pipe.settings, sizes=tuple((canvas.panel_height, canvas.panel_width) for canvas in canvases)
    )
    encode = latents.canvas_encoder(pipe.encode_canvas, canvases[0].panels)
    vae = latents.vae_fingerprint(pipe)
    aligned = tasks.load(recipe.task).geometry == "aligned"
    files = []
    for each in material.sets:
        key = f"{vae} {each.fingerprint()}"
        files.append(
            latents.build(each, folder / "latents", encode, canvases, key, preparing, processes, aligned=aligned)
        )
    cache = latents.Latents(*files)
    captions = [sample.caption for sample in cache.samples]
    if options.instructions:
        captions += [sample.instruction for sample in cache.samples if sample.instruction]
    embeddings = cached.prepare(torch.no_grad()(pipe.encode_text), captions, preparing)
    if isinstance(embeddings, cached.Table) and device.type != "cpu":
        _set_aside(pipe)
    train_rows, validation_rows = latents.split(cache.samples, options.validation_pairs)
    negatives = None
    if options.preference is not None:
        train_rows = preference.choose(train_rows, cache, options.preference.pairs)
        drawing = preference.Drawing(pipe, places, cache, embeddings, options)
        with _as_it_starts(pipe, recipe):
            key = f"{made_from['base']} {made_from['pairs']}"
            negatives = drawing.draw(train_rows, folder, key, preparing, processes)
    made_from["panel_size"] = buckets.named(places)
    return Job(
        pipe=pipe,
        buckets=places,
        options=options,
        device=device,
        latents=cache,
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
    )


def _columns(pipe: DiptychPipeline, options: Distill, canvas: Canvas) -> torch.Tensor | None:
    """Where the input layer's columns for the condition begin (`distill.condition_init`); None leaves them at zero."""
    from PIL import Image

    from diptych.student.weights.fold import picture_columns

    if options.condition_init == "zeros" or options.init:
        return None
    empty = None
    if options.conditioning == "diptych":
        black = Image.new("RGB", (canvas.panel_width, canvas.panel_height))
        empty = pipe.encode_reference([black], canvas).mean((0, 1)).cpu()
    return picture_columns(pipe.transformer.x_embedder.weight.detach().float().cpu(), empty)


def _set_aside(pipe: DiptychPipeline) -> None:
    """Text encoders go back to main memory: every caption is encoded, and the device has better uses for its own."""
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        if encoder is not None:
            encoder.to("cpu")  # pyright: ignore[reportArgumentType]


@contextmanager
def _as_it_starts(pipe: DiptychPipeline, recipe: Recipe) -> Iterator[None]:
    """The pipeline with the LoRA that training goes on from, if it does; without it again afterwards."""
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
    """Fingerprints of what a student is made from: the weights it starts from, and its pairs."""
    init = recipe.distill.init
    places = [models.resolve(init, "student")] if init else []
    if recipe.distill.mode == "lora" or not init:
        places.insert(0, models.resolve(recipe.teacher, "teacher"))
    return {"base": " ".join(map(models.fingerprint, places)), "pairs": material.fingerprint()}


def start(recipe: Recipe, device: Any) -> DiptychPipeline:
    """The student before its first step: the teacher widened, or, in mode full, the student that `distill.init` names;
    its frozen weights quantized as the recipe has it. A LoRA to go on from is put on by `parts.select`."""
    from diptych import student
    from diptych.student.loading import pick_dtype
    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.settings import resolve
    from diptych.student.weights.fold import widen

    teacher, settings = models.resolve(recipe.teacher, "teacher"), recipe.distill
    dtype = pick_dtype(teacher / "transformer", device)
    check_init(recipe, teacher)
    if settings.init and settings.mode == "full":
        with quiet_bars():
            pipe = student.load(settings.init, base=recipe.teacher, device=device, fuse=True)
        pipe.settings = _settings(recipe, pipe.settings.words)
        return pipe
    stock = teachers.open_teacher(teacher, dtype, "FluxPipeline")
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    components = {name: stock.components[name] for name in names}
    pipe = DiptychPipeline(transformer=widen(stock.transformer), **components)
    pipe.loaded_from = (teacher,)
    pipe.settings = _settings(recipe, resolve(None, [teacher]).words)
    pipe.set_progress_bar_config(disable=True)
    if settings.offload == "blocks":  # `parts.select` moves the rest of it
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            if part is not None:
                part.to(device)
        return pipe
    return _quantized(pipe, settings.quantize, device, dtype).to(device)


def check_init(recipe: Recipe, teacher: Path) -> None:
    """UsageError if the student that `distill.init` names cannot be trained on so; nothing where it names none."""
    from diptych.student.weights.sources import locate, read_settings

    settings = recipe.distill
    if not settings.init:
        return
    place = models.resolve(settings.init, "student")
    if (other := read_settings(place, teacher).conditioning) != settings.conditioning:
        raise UsageError(
            f"distill.init: {settings.init} is a student of {other} conditioning; set distill.conditioning={other}"
        )
    if settings.mode == "lora" and locate(place, teacher)[0] != "control-lora":
        raise UsageError(
            f"distill.init: {settings.init} is a whole student, and adapters are saved for the teacher; "
            "name a control-LoRA, or use mode: full"
        )


def _quantized(pipe: DiptychPipeline, name: str, device: torch.device, dtype: torch.dtype) -> DiptychPipeline:
    if name != "none":
        from diptych.student.runtime.quantize import problem, quantize

        if told := problem(name, device.type):
            raise UsageError(f"distill.quantize: {told}")
        quantize(pipe.transformer, name, device, dtype)
    return pipe


def finished(out: Path, recipe: Recipe, material: Material) -> dict[str, Any] | None:
    """The summary of a training that this recipe, base and data have finished in `out` before; None otherwise."""
    try:
        stored = json.loads((out / TRAINING / SUMMARY).read_text("utf8"))
    except (OSError, ValueError):
        return None
    return stored["summary"] if stored.get("made_by") == _made_by(recipe, material) else None


def _made_by(recipe: Recipe, material: Material) -> dict[str, Any]:
    settings = recipe.distill.model_dump(mode="json", exclude=set(harmless(recipe.distill)))
    return {"distill": settings, "seed": recipe.training_seed, **sources(recipe, material)}


def finish(trainer: Trainer, recipe: Recipe, out: Path, recipe_sha256: str | None = None) -> dict[str, Any]:
    """Writes the student of the averaged weights (the last ones, or the best), its card, and, last, the summary that
    says it is whole.

    In several processes the first one writes and the others wait.
    """
    from diptych.train.loop import summary

    if recipe.distill.export == "best":
        trainer.take_best()
    numbers = summary(trainer)
    made_from, material = trainer.job.made_from, trainer.job.material
    provenance = {"teacher": recipe.teacher, "task": recipe.task, "steps": numbers["exported"], **made_from}
    provenance |= {"name": recipe.name, "mode": recipe.distill.mode, "number_of_pairs": numbers["pairs"]}
    if material.own is not None and material.own in material.sets:
        provenance["pairs_manifest"] = material.own.manifest_hash()
    if recipe_sha256 is not None:
        provenance["recipe_sha256"] = recipe_sha256
    whole = trainer.averages() if trainer.spread else None
    with trainer.processes.together() as first:
        if first:
            card = model_card(recipe, numbers, material)
            if whole is not None:
                _export(*_assembled(recipe, trainer.options, whole), None, recipe, provenance, card, out)
            else:
                _export(trainer.job.pipe, trainer.trained, trainer.ema, recipe, provenance, card, out)
            stored = {"summary": numbers, "made_by": _made_by(recipe, material)}
            stored |= {"files": models.files(out), "fingerprint": models.fingerprint(out)}
            stored["sha256"] = text_hash(stored)
            write_atomic(out / TRAINING / SUMMARY, (json.dumps(stored, indent=2) + "\n").encode())
    return numbers


def _assembled(recipe: Recipe, options: Distill, weights: dict[str, torch.Tensor]) -> tuple[DiptychPipeline, Trained]:
    """A student on the CPU with these trained weights: what several processes held in parts."""
    import torch

    from diptych.train import parts

    cpu = torch.device("cpu")
    pipe = start(recipe, cpu)
    trained = parts.select(pipe.transformer, options, "float32", cpu)
    trained.put(weights)
    return pipe, trained


def _export(
    pipe: DiptychPipeline,
    trained: Trained,
    ema: Any | None,
    recipe: Recipe,
    provenance: dict[str, Any],
    card: str,
    out: Path,
) -> None:
    """The student folder, with the averaged weights if there is an average; whole or not at all."""
    from safetensors import SafetensorError

    from diptych.student.settings import KEY
    from diptych.train import parts
    from diptych.train.lora import save_lora

    temporary = out / TRAINING / ".export"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with parts.averaged(ema, trained):
            if recipe.distill.mode == "full":
                from diptych import student

                with quiet_bars():
                    student.save(pipe, temporary)
            else:
                registered = {"config": {KEY: pipe.settings.values()}}
                save_lora(pipe.transformer, trained, recipe.distill.rank, temporary, provenance | registered)
        (temporary / "README.md").write_text(card, "utf8")
        (temporary / ORIGIN).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n", "utf8")
        _publish(temporary, out)
    except (OSError, SafetensorError) as error:  # the latter is what a full disk is to safetensors
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write the student to {out}: {reason}; its last checkpoint is whole: "
            "make room and run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settings(recipe: Recipe, words: tuple[str, ...] | None) -> Settings:
    """What the student registers: how the recipe evaluates it, where it says so, is how it is sampled by default."""
    from diptych.student.settings import Settings

    asked = recipe.evaluate.model_dump(include={"steps", "image_guidance", "text_guidance", "null_panel"})
    said = {name: value for name, value in asked.items() if value is not None}
    relight = recipe.evaluate.relighting.model_dump(exclude_none=True)
    return Settings(conditioning=recipe.distill.conditioning, relight=relight, words=words, **said)


def _publish(written: Path, out: Path) -> None:
    """Moves a whole student into `out`, beside `training/`; the index that makes it one comes last."""
    (out / INDEX).unlink(missing_ok=True)
    for path in sorted(written.iterdir(), key=lambda p: p.name == INDEX):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
