"""The model card of a student: what it is, what it was trained on, how, and whose licence it is under."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diptych.data.records import in_force
from diptych.data.store import Dataset
from diptych.utils import models
from diptych.utils.machine import VERSION

if TYPE_CHECKING:
    from diptych.recipe.schema import Recipe
    from diptych.train.job import Material


CONDITIONING = {
    "diptych": "the reference is the left panel of the canvas",
    "channel": "the reference is joined to the target panel, channel by channel",
}
COLUMNS = {"zeros": "zeros", "teacher": "the teacher's own for a picture"}


def model_card(recipe: Recipe, numbers: dict[str, Any], material: Material) -> str:
    """README.md with the hub's front matter. `numbers` is `loop.summary`'s."""
    lora = recipe.distill.mode == "lora"
    licence, terms = models.licence_of(recipe.teacher, models.resolve(recipe.teacher, "teacher"))
    front = {
        **licence,
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "base_model": recipe.teacher,
        "base_model_relation": "adapter" if lora else "finetune",
        "tags": ["diptych", "diffusion-self-distillation", "flux", *(["lora"] if lora else [])],
    }
    if "/" not in recipe.teacher or Path(recipe.teacher).exists():
        # The hub would look a local path up and refuse the card.
        del front["base_model"], front["base_model_relation"]
    validation = numbers["validation"]
    rows = {
        "task": recipe.task,
        "base": recipe.distill.init or recipe.teacher,
        "conditioning": CONDITIONING[recipe.distill.conditioning],
        "its columns began as": "in that student" if recipe.distill.init else COLUMNS[recipe.distill.condition_init],
        "mode": f"LoRA, rank {recipe.distill.rank}, and the input layer" if lora else "all weights",
        "parameters trained": f"{numbers['parameters']:,}",
        "pairs trained on / held out": f"{numbers['pairs']:,} / {numbers['validation_pairs']:,}",
        "steps × batch": f"{numbers['steps']:,} × {recipe.distill.batch_size} ({numbers['epochs']:g} epochs)",
        "weights of step": f"{numbers['exported']:,}",
        "learning rate": f"{recipe.distill.learning_rate:g}",
        "precision": numbers["precision"],
        "loss, left / right panel": f"{numbers['loss']['left']:.4f} / {numbers['loss']['right']:.4f}",
        "validation loss": "none held out" if validation is None else f"{validation['loss']:.4f}",
        "seed": recipe.training_seed,
        "seconds of training": f"{numbers['seconds']:,.0f}",
        "diptych": VERSION,
    }
    use = (
        f'pipe = FluxControlPipeline.from_pretrained("{recipe.teacher}"); pipe.load_lora_weights(FOLDER)'
        if lora
        else 'Student.load(FOLDER).generate(reference, "…", seed=0)'
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {recipe.name}",
            "",
            "A Diffusion Self-Distillation student (arXiv 2411.18616): a text-to-image model that also takes a "
            "reference image. It was trained by diptych"
            f"{' on pairs that its own teacher drew' if list(material.sets) == [material.own] else ''}.",
            "",
            f"`{use}`",
            "",
            "## Training",
            "",
            *_table(rows),
            "",
            "## Data",
            "",
            *_data(recipe, material),
            "",
            "## Licence",
            "",
            terms,
            "",
        ]
    )


def _data(recipe: Recipe, material: Material) -> list[str]:
    """What it was trained on, and how the run's own pairs were chosen."""
    lines: list[str] = []
    own = material.own
    if own is not None and own in material.sets:
        tests, limits = in_force(recipe)
        chosen = f"; a pair was kept if {_and(tests)}" if tests else ""
        kept = curation(own) if tests else {}
        lines += [
            f"Drawn by the teacher itself{chosen}.",
            "",
            *_table({"pairs": f"{len(own):,}", **limits, **kept}),
            "",
        ]
    data = zip(material.sets, material.weights, strict=True)
    others = {each.url: f"{len(each):,} pairs, weight {weight:g}" for each, weight in data if each is not own}
    if others:
        lines += ["Made elsewhere; look up their licences before you publish.", "", *_table(others), ""]
    return lines[:-1]


def _and(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def curation(pairs: Dataset) -> dict[str, Any]:
    """How many candidates curation saw and which share it kept, where the run's folder still has them."""
    if "://" in pairs.url:
        return {}
    candidates = Dataset(Path(pairs.url).parent / "candidates")
    manifest = candidates.manifest
    if not manifest or not manifest["rows"]:
        return {}
    return {"candidates": f"{manifest['rows']:,}", "kept": f"{len(pairs) / manifest['rows']:.1%}"}


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
