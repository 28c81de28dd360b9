"""Stage 4, distill: the teacher becomes a student, trained on its own curated pairs (paper section 3.2).

    distill(recipe, Dataset("runs/demo/pairs"), Path("runs/demo/student"))

The folder ends as an ordinary diffusers pipeline (mode full) or a control-LoRA file (mode lora), with a model card and
`training/`: metrics.jsonl, checkpoints, sample sheets, the latent cache. Called again it continues; when it is finished
it returns its summary at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych import models
from diptych.console import quiet_bars
from diptych.data.sources import Pairs, open_pairs
from diptych.data.store import Dataset, write_atomic
from diptych.errors import UserError
from diptych.sections import OWN, Data
from diptych.train.card import model_card
from diptych.train.metrics import Progress, report

if TYPE_CHECKING:
    import torch

    from diptych.sections import Recipe
    from diptych.student.geometry import Canvas
    from diptych.student.pipeline import DiptychPipeline
    from diptych.train.loop import Job, Trainer
    from diptych.train.options import Options
    from diptych.train.parts import Trained
    from diptych.train.processes import Processes

TRAINING = "training"
SUMMARY = "summary.json"
INDEX = "model_index.json"
log = logging.getLogger(__name__)


def distill(recipe: Recipe, pairs: Dataset | None, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Trains a student on `pairs`, and on what `distill.data` names, into the folder `out`.

    Returns a summary of plain values (`loop.summary`).

    Args:
        recipe: `distill`, `teacher`, `seed`, `device`, `threads` and `paint.panel_size` are read.
        pairs: the run's own, rows of `records.PAIR`; those that curation did not keep are passed over. None where
            `distill.data` has other people's alone.
        out: made if need be; a checkpoint in it is continued exactly.
        progress: called, or its `update` called, with (step, total, text).

    Raises UserError (too few pairs, a step that went wrong, a full disk), UsageError (a checkpoint of another
    training). Ctrl-C saves a checkpoint and raises KeyboardInterrupt.
    """
    from diptych.student.loading import pick_device
    from diptych.train.loop import train
    from diptych.train.processes import join

    out = Path(out)
    steps = recipe.distill.steps
    if (done := finished(out, recipe, pairs)) is not None:
        report(progress, steps, steps, "already trained")
        return done
    processes, device = join(pick_device(recipe.device))
    progress = progress if processes.first else None
    trainer = train(prepare(recipe, pairs, out, progress, processes, device), progress)
    return finish(trainer, recipe, pairs, out)


def training_data(recipe: Recipe, own: Dataset | None) -> list[tuple[Pairs, float]]:
    """The data sets to train on, with their weights."""
    found: list[tuple[Pairs, float]] = []
    for data in recipe.distill.data or [Data(path=OWN)]:
        if data.path != OWN:
            found.append((open_pairs(data.path, {**data.columns}), data.weight))
        elif own is not None:
            found.append((own, data.weight))
    return found


def prepare(
    recipe: Recipe,
    pairs: Dataset | None,
    out: Path,
    progress: Progress | None = None,
    processes: Processes | None = None,
    device: torch.device | None = None,
) -> Job:
    """Everything up to the first step: models opened, pairs and captions encoded, some held out."""
    import torch

    from diptych.student.geometry import Canvas
    from diptych.student.loading import pick_device
    from diptych.train import checkpoint, latents, preference, text
    from diptych.train.hardware import pick_precision
    from diptych.train.loop import Job
    from diptych.train.options import Options
    from diptych.train.processes import ALONE

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device, processes = device or pick_device(recipe.device), processes or ALONE
    options = Options.of(recipe.distill, seed=recipe.training_seed)
    precision, reason = pick_precision(options.precision, device)
    log.info("training on %s in %s: %s", device, precision, reason)

    folder = out / TRAINING
    made_from = sources(recipe, pairs)
    pipe = start(recipe, device)
    size = recipe.paint.panel_size or pipe.default_panel_size
    canvas = Canvas(size, size, pipe.vae_scale_factor)
    shift = timestep_shift(pipe, canvas) if options.shift == "auto" else options.shift
    options = replace(options, precision=precision, shift=shift)  # pyright: ignore[reportArgumentType]
    at = checkpoint.pointer(folder, checkpoint.LATEST)
    step = int(at.removeprefix("step-")) if at else 0

    def preparing(done: int, total: int, what: str) -> None:
        report(progress, step, options.steps, f"{what} {done}/{total}")

    encode = latents.canvas_encoder(pipe.encode_canvas)
    vae = _vae_fingerprint(pipe)
    data = training_data(recipe, pairs)
    files = [
        latents.build(each, folder / "latents", encode, canvas, f"{vae} {each.fingerprint()}", preparing, processes)
        for each, _ in data
    ]
    cache = latents.Latents(*files)
    captions = [sample.caption for sample in cache.samples]
    if options.instructions:
        captions += [sample.instruction for sample in cache.samples if sample.instruction]
    embeddings = text.prepare(torch.no_grad()(pipe.encode_text), captions, preparing)
    train_rows, validation_rows = latents.split(cache.samples, options.validation_pairs)
    made_from["panel_size"] = str(size)
    negatives = None
    if options.preference is not None:
        train_rows = preference.choose(train_rows, cache, options.preference.pairs)
        key = f"{made_from['base']} {made_from['pairs']}"
        negatives = preference.draw(
            pipe, cache, embeddings, train_rows, canvas, options, folder, key, preparing, processes
        )
    return Job(
        pipe=pipe,
        canvas=canvas,
        options=options,
        device=device,
        latents=cache,
        text=embeddings,
        train_rows=train_rows,
        validation_rows=validation_rows,
        folder=folder,
        made_from=made_from,
        processes=processes,
        name=recipe.name,
        weights=[weight for _, weight in data],
        negatives=negatives,
    )


def timestep_shift(pipe: DiptychPipeline, canvas: Canvas) -> float:
    """The shift s that the base samples a canvas of this size with (`distill.shift: auto`)."""
    from diptych.student.timesteps import shift_exponent

    config = pipe.scheduler.config
    mu = shift_exponent(config, canvas.tokens)
    return float(config.get("shift", 1.0)) if mu is None else math.exp(mu)


def sources(recipe: Recipe, pairs: Dataset | None) -> dict[str, str]:
    """Fingerprints of what a student is made from. UserError when there is nothing to train on."""
    data = training_data(recipe, pairs)
    for each, _ in data:
        if not len(each):
            cure = "lower curate.thresholds or draw more grids (write.count)" if each is pairs else "give other data"
            raise UserError(f"{each.url} holds no pairs, so there is nothing to train on; {cure}")
    prints = [each.fingerprint() for each, _ in data]
    if recipe.distill.data:
        weighed = [[*both] for both in zip(prints, (weight for _, weight in data), strict=True)]
        prints = [hashlib.sha256(json.dumps(weighed).encode()).hexdigest()]
    return {"base": models.fingerprint(_base(recipe)), "pairs": prints[0]}


def _base(recipe: Recipe) -> Path:
    """The folder that the weights come from: `distill.init`, else the teacher."""
    if recipe.distill.init:
        return models.resolve(recipe.distill.init, "student")
    return models.resolve(recipe.teacher, "teacher")


def start(recipe: Recipe, device: Any) -> DiptychPipeline:
    """The student before its first step: the teacher widened, or the student that `distill.init` names; its frozen
    weights quantized as the recipe has it."""
    from diffusers import FluxPipeline

    from diptych import student
    from diptych.student.loading import pick_dtype
    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.weights import widen

    teacher = models.resolve(recipe.teacher, "teacher")
    dtype = pick_dtype(teacher / "transformer", device)
    if recipe.distill.init:
        with quiet_bars():
            pipe = student.load(recipe.distill.init, base=recipe.teacher, device=device, fuse=True)
        return _quantized(pipe, recipe.distill.quantize, device, dtype)
    try:
        with quiet_bars():
            stock = FluxPipeline.from_pretrained(str(teacher), torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"the teacher in {teacher} cannot be opened as a FLUX pipeline ({line})") from error
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    components = {name: stock.components[name] for name in names}
    pipe = DiptychPipeline(transformer=widen(stock.transformer), **components)
    pipe.loaded_from = (teacher,)
    pipe.set_progress_bar_config(disable=True)
    return _quantized(pipe, recipe.distill.quantize, device, dtype).to(device)


def _quantized(pipe: DiptychPipeline, name: str, device: torch.device, dtype: torch.dtype) -> DiptychPipeline:
    if name != "none":
        from diptych.student.quantize import quantize

        quantize(pipe.transformer, name, device, dtype)
    return pipe


def _vae_fingerprint(pipe: DiptychPipeline) -> str:
    """sha256 over the VAE's weights in memory and its scaling: names what a latent means."""
    import torch

    digest = hashlib.sha256(repr((pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor)).encode())
    for name, tensor in pipe.vae.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def finished(out: Path, recipe: Recipe, pairs: Dataset | None) -> dict[str, Any] | None:
    """The summary of a training that this recipe, base and data have finished in `out` before; None otherwise."""
    try:
        stored = json.loads((out / TRAINING / SUMMARY).read_text("utf8"))
    except (OSError, ValueError):
        return None
    return stored["summary"] if stored.get("made_by") == _made_by(recipe, pairs) else None


def _made_by(recipe: Recipe, pairs: Dataset | None) -> dict[str, Any]:
    return {"distill": recipe.distill.model_dump(mode="json"), "seed": recipe.training_seed, **sources(recipe, pairs)}


def finish(trainer: Trainer, recipe: Recipe, pairs: Dataset | None, out: Path) -> dict[str, Any]:
    """Writes the student of the averaged weights, its card, and, last, the summary that says it is whole.

    In several processes the first one writes and the others wait.
    """
    from diptych.train.loop import summary

    numbers = summary(trainer)
    made_from = trainer.job.made_from
    provenance = {"base": recipe.teacher, "task": recipe.task, "steps": numbers["steps"], **made_from}
    whole = trainer.averages() if trainer.spread else None
    with trainer.processes.together() as first:
        if first:
            card = model_card(recipe, numbers, training_data(recipe, pairs), pairs)
            if whole is not None:
                _export(*_assembled(recipe, trainer.options, whole), None, recipe, provenance, card, out)
            else:
                _export(trainer.job.pipe, trainer.trained, trainer.ema, recipe, provenance, card, out)
            stored = {"summary": numbers, "made_by": _made_by(recipe, pairs)}
            write_atomic(out / TRAINING / SUMMARY, (json.dumps(stored, indent=2) + "\n").encode())
    return numbers


def _assembled(recipe: Recipe, options: Options, weights: dict[str, torch.Tensor]) -> tuple[DiptychPipeline, Trained]:
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
    from diptych.train import parts
    from diptych.train.options import Options

    temporary = out / TRAINING / ".export"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with parts.averaged(ema, trained):
            if recipe.distill.mode == "full":
                from diptych import student

                student.save(pipe, temporary)
            else:
                options = Options.of(recipe.distill, seed=recipe.training_seed)
                parts.save_lora(pipe.transformer, trained, options, temporary, provenance)
        (temporary / "README.md").write_text(card, "utf8")
        (temporary / "sampling.json").write_text(json.dumps(_sampling(recipe)) + "\n", "utf8")
        _publish(temporary, out)
    except OSError as error:
        raise UserError(
            f"cannot write the student to {out}: {error.strerror or error}; its last checkpoint is whole: "
            "make room and run the same command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sampling(recipe: Recipe) -> dict[str, float]:
    """How the recipe evaluates its student is how the student is sampled by default."""
    asked = recipe.evaluate
    return {"steps": asked.steps, "image_guidance": asked.image_guidance, "text_guidance": asked.text_guidance}


def _publish(written: Path, out: Path) -> None:
    """Moves a whole student into `out`, beside `training/`; the index that makes it one comes last."""
    (out / INDEX).unlink(missing_ok=True)
    for path in sorted(written.iterdir(), key=lambda p: p.name == INDEX):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
