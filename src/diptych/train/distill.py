"""Stage 4, distill: the teacher becomes a student, trained on its own curated pairs (paper section 3.2).

    distill(recipe, Dataset("runs/demo/pairs"), Path("runs/demo/student"))

The result is a folder with an ordinary diffusers pipeline (mode full) or a control-LoRA file (mode lora), a model card
and `training/`: metrics.jsonl, checkpoints, sample sheets, the latent cache. A second call resumes the training, or
returns its summary if it is finished.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data.seal import text_hash
from diptych.data.store import Dataset
from diptych.recipe import tasks
from diptych.student.families import teachers
from diptych.train import export
from diptych.train.checkpoint import harmless
from diptych.train.metrics import METRICS, Progress, read, reference_warning, report
from diptych.train.prepare import TRAINING, Material, prepare, sources
from diptych.utils import models
from diptych.utils.io import write_atomic

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe
    from diptych.train.loop import Trainer

SUMMARY = "summary.json"
log = logging.getLogger(__name__)
SHOWN = 20  # the summary's losses are means over this number of last steps


def distill(
    recipe: Recipe,
    pairs: Dataset | None,
    out: Path,
    progress: Progress | None = None,
    recipe_sha256: str | None = None,
) -> dict[str, Any]:
    """Trains a student on `pairs`, and on what `distill.data` names, into the folder `out`.

    Returns a summary of plain values (`summary`).

    Args:
        recipe: `distill`, `teacher`, `seed`, `device`, `threads` and `paint.panel_size` are read.
        pairs: the run's pairs, rows of `records.PAIR`, of which rejected ones are skipped. None if `distill.data` names
            only other data.
        out: the student's folder, which is created. Training resumes exactly from a checkpoint in it.
        progress: a function, or an object with `update`, that is called with (step, total, text).
        recipe_sha256: hash of the run's recipe.yaml, which the student records as its origin.

    Raises:
        UserError: too few pairs, a diverged step, or a full disk.
        UsageError: a checkpoint of another training, or a step-distilled teacher.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint saved.
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
    processes.share(range(recipe.distill.batch_size))  # raises before anything is encoded if it does not divide
    progress = progress if processes.first else None
    trainer = train(prepare(recipe, material, out, progress, processes, device), progress)
    return finish(trainer, recipe, out, recipe_sha256)


def finished(out: Path, recipe: Recipe, material: Material) -> dict[str, Any] | None:
    """The summary of a finished training in `out` with this recipe, base and data. None if there is none."""
    try:
        stored = json.loads((out / TRAINING / SUMMARY).read_text("utf8"))
    except (OSError, ValueError):
        return None
    return stored["summary"] if stored.get("made_by") == _made_by(recipe, material) else None


def _made_by(recipe: Recipe, material: Material) -> dict[str, Any]:
    settings = recipe.distill.model_dump(mode="json", exclude=set(harmless(recipe.distill)))
    return {"distill": settings, "seed": recipe.training_seed, **sources(recipe, material)}


def finish(trainer: Trainer, recipe: Recipe, out: Path, recipe_sha256: str | None = None) -> dict[str, Any]:
    """Writes the student with the averaged weights (the last or the best ones), its card, and, last, the summary, which
    marks it as complete.

    Of several processes, the first one writes and the others wait.
    """
    if recipe.distill.export == "best":
        trainer.take_best()
    numbers = summary(trainer)
    if trainer.processes.first and (warning := reference_warning(numbers["validation"])):
        log.warning("%s", warning)
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
            card = export.model_card(recipe, numbers, material)
            if whole is not None:
                export.write(*export.assembled(recipe, trainer.options, whole), None, recipe, provenance, card, out)
            else:
                export.write(trainer.job.pipe, trainer.trained, trainer.ema, recipe, provenance, card, out)
            stored = {"summary": numbers, "made_by": _made_by(recipe, material)}
            stored |= {"files": models.files(out), "fingerprint": models.fingerprint(out)}
            stored["sha256"] = text_hash(stored)
            write_atomic(out / TRAINING / SUMMARY, (json.dumps(stored, indent=2) + "\n").encode())
    return numbers


def summary(trainer: Trainer) -> dict[str, Any]:
    """The numbers of a finished training. Its losses are those of the exported weights."""
    exported = trainer.exported or trainer.step
    lines = [line for line in read(trainer.job.folder / METRICS) if line["step"] <= exported][-SHOWN:]
    validation = next((line["validation"] for line in reversed(lines) if "validation" in line), None)
    return {
        "steps": trainer.step,
        "samples_seen": trainer.step * trainer.options.batch_size,
        "epochs": round(trainer.step * trainer.options.batch_size / trainer.order.epoch_size, 2),
        "pairs": trainer.order.count,
        "validation_pairs": len(trainer.job.validation_rows),
        "pairs_skipped": trainer.job.latents.skipped,
        "parameters": trainer.trained.count,
        "precision": trainer.options.precision,
        "loss": {key: sum(line[key] for line in lines) / len(lines) for key in ("loss", "left", "right")},
        "validation": validation,
        "best": trainer.best,
        "exported": exported,
        "seconds": round(trainer.seconds, 1),
    }
