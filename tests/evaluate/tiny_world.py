"""A pocket world of random models, small enough for tests: 32 px panels, real classes, real tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from diptych.evaluate import suites
from diptych.evaluate.suites import Suite


def make_teacher(folder: Path) -> Path:
    """A complete FluxPipeline folder of random weights that reads the pocket vocabulary."""
    from diptych.pocket.pretrain import tokenizers

    tiny.pocket_teacher(folder, 32)
    tokenizers.save(folder, *tokenizers.make_tokenizers())
    return folder


def make_transformer() -> Any:
    """One double and one single block of width 32 on 32-channel tokens."""
    return tiny.flux(guidance_embeds=False)


def make_student(teacher: Path, folder: Path) -> Path:
    """A student's folder as distill leaves it, its condition columns random."""
    return tiny.widened(teacher, folder)


def make_judges(folder: Path) -> Path:
    """Random judges of the classes that the pocket world's have: `curator`, `scorer` and `reader`."""
    import torch
    from transformers import (
        RegNetConfig,
        RegNetModel,
        ResNetConfig,
        ResNetForImageClassification,
        ResNetModel,
        ViTImageProcessorPil,
    )

    from diptych.pocket.pretrain.judges import LABELS

    torch.manual_seed(3)
    labels = dict(enumerate(LABELS))
    reader = ResNetConfig(**tiny.RESNET, id2label=labels, label2id={v: k for k, v in labels.items()})
    made = {
        "curator": ResNetModel(ResNetConfig(**tiny.RESNET)),
        "scorer": RegNetModel(RegNetConfig(**{**tiny.RESNET, "layer_type": "y"}, groups_width=8)),
        "reader": ResNetForImageClassification(reader),
    }
    side = {"height": 32, "width": 32}
    for role, model in made.items():
        model.save_pretrained(folder / role)
        ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / role)
    return folder


def make_suite(calibration: int = 20, check: int = 20) -> Suite:
    """The pocket suite with few renders."""
    suite = suites.load("pocket")
    fewer = suites.Calibration(identities=calibration, kinds=4)
    return suite.model_copy(
        update={"calibration": fewer, "check": suite.check.model_copy(update={"identities": check})}
    )


def make_recipe(teacher: Path, judges: Path, **evaluate: Any) -> Any:
    """A recipe for that teacher and those judges, quick to evaluate."""
    from diptych.recipe.schema import Recipe

    settings = {
        "samples": 4,
        "prompts": 2,
        "methods": ["student", "text_only", "copy", "inpaint"],
        "steps": 3,
        "batch_size": 4,
        "bootstrap": 100,
        "scorer": str(judges / "scorer"),
        "reader": str(judges / "reader"),
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "teacher": str(teacher),
            "device": "cpu",
            "threads": 1,
            "curate": {"judge": str(judges / "curator")},
            "evaluate": {**settings, **evaluate},
        }
    )


def make_data(folder: Path, grids: int = 12) -> None:
    """prompts/, grids/, candidates/ and pairs/ of a run whose teacher is the renderer, with simple numbers."""
    import json

    import numpy as np
    from PIL import Image

    from diptych.data import records, verdicts
    from diptych.data.images import image_cell
    from diptych.data.store import Dataset
    from diptych.evaluate.scoring import metrics
    from diptych.pocket import captions, world
    from diptych.pocket.render import render
    from diptych.recipe.schema import Thresholds

    rows: dict[str, list[dict[str, Any]]] = {"prompts": [], "grids": [], "candidates": []}
    for i in range(grids):
        rng = np.random.default_rng([7, i])
        subject = world.sample_identity(rng)
        scenes = [world.sample_scene(rng), world.sample_scene(rng)]
        second = subject if i % 2 else world.drift(rng, subject, 1 + i % 6)
        prompt, said = captions.grid(subject.kind, scenes[0], scenes[1], rng)
        panels = [Image.fromarray(render(*who)) for who in ((subject, scenes[0]), (second, scenes[1]))]
        whole = Image.new("RGB", (64, 32))
        for place, panel in enumerate(panels):
            whole.paste(panel, (32 * place, 0))
        shared = {"prompt": prompt, "panels": said, "subject": subject.kind, "task": "subject", "seed": i}
        name = records.grid_id(records.prompt_id(i))
        rows["prompts"].append({"id": records.prompt_id(i), **shared})
        grid = {"id": name, "image": image_cell(whole), "prompt_id": records.prompt_id(i), **shared}
        rows["grids"].append({**grid, "rows": 1, "cols": 2, "panel_size": 32, "model": "renderer"})
        alike = float(np.clip(rng.normal(0.75 if i % 2 else 0.35, 0.12), 0, 1))
        distance = float(metrics.copy_distances(panels[:1], panels[1:])[0])
        kept, reason = verdicts.verdict(alike, distance, 1.0, Thresholds())
        for a, b in ((0, 1), (1, 0)):
            pair = {"conditioning": image_cell(panels[a]), "image": image_cell(panels[b]), "caption": said[b]}
            pair |= {"instruction": "", "id": records.pair_id(name, a, b), "grid_id": name}
            pair |= {"reference_caption": said[a], "task": "subject", "subject": subject.kind, "reference_panel": a}
            pair |= {"target_panel": b, "seed": i, "similarity": alike, "copy_distance": distance, "seam": 1.0}
            pair |= {"kept": kept, "reason": reason, "judge": "oracle", "evidence": json.dumps({})}
            rows["candidates"].append(pair)
    rows["pairs"] = [row for row in rows["candidates"] if row["kept"]]
    for name, made in rows.items():
        data = Dataset(folder / name, records.schema(records.COLUMNS[name]))
        data.write_shard(0, made, "tiny")
        data.publish({"fingerprint": "tiny", "teacher_sha256": "0" * 64})


def make_run(teacher: Path, folder: Path, mode: str) -> Path:
    """A whole small run with a student, painted by that teacher; its judges lie in `folder` too."""
    from diptych.recipe.schema import Recipe
    from diptych.run.runner import run
    from diptych.utils.console import Display

    values: dict[str, Any] = make_recipe(teacher, make_judges(folder / "judges")).values()
    values |= {"write": {"count": 8, "shard_size": 4}, "paint": {"steps": 2, "batch_size": 4}}
    values["curate"] |= {"batch_size": 4, "thresholds": {"same": -1, "near_copy": 0, "seam": -1}}
    values["distill"] |= {"steps": 2, "batch_size": 4, "warmup": 1, "validation_pairs": 2, "sample_every": 2}
    values["distill"] |= {"mode": mode}
    out = folder / "runs" / "tiny"
    run(Recipe.model_validate(values), out, ("write", "paint", "curate", "distill"), Display(quiet=True))
    return out
